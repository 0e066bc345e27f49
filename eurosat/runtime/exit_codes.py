"""Exit codes of every command."""

OK = 0
NEGATIVE = 1
"""A negative verdict: validation failed, a gate refused, the doctor found a fault."""
BAD_INPUT = 2
"""Bad input or environment, named in one line on standard error."""
FAULT = 70
"""A bug of this project, with its traceback."""
INTERRUPTED = 130
TERMINATED = 143
