"""The process and the machine that it runs on: arguments, logs, settings, files."""
