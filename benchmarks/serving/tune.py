"""tune-serving: find the number of processes and the batch size that are fastest on this machine.

`python -m benchmarks.serving.tune [--rounds 3]` tries each setting with the network of
bench-serving, and prints the flags of the fastest.
"""

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from rich.table import Table

from benchmarks.serving import arms, load, model
from benchmarks.serving.process import Server, running
from eurosat.runtime import cli, exit_codes, hardware, logs, tables
from tests.support.mlflow_server import free_port

BATCHES = (4, 8, 16, 32)
CLIENTS = 32


def main(argv: Sequence[str]) -> int:
    parser = cli.parser(
        "benchmarks.serving.tune", "Find the fastest settings of our server on this machine."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument(
        "--retrain", action="store_true", help="train the network again, though it is cached"
    )
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    load.check_installed()
    served = model.prepare(retrain=args.retrain)
    arm = next(arm for arm in arms.ours() if arm.name == "server")
    processes = sorted({1, max(1, hardware.cores() // 2), hardware.cores()})
    rates: dict[tuple[int, int], list[float]] = {
        setting: [] for setting in product(processes, BATCHES)
    }
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder, started = Path(scratch), dict[tuple[int, int], Server]()
        requests = arm.requests(served, folder)
        for count, batch in rates:
            port = free_port()
            flags = ["--processes", str(count), "--max-batch", str(batch)]
            command = [*arm.command(served, port), *flags]
            name = f"server-{count}-{batch}"
            server = stack.enter_context(
                running(name, command, arm.environment(served), port, arm.ready, folder)
            )
            server.pause()
            started[count, batch] = server
        for number in range(args.rounds):
            for setting, server in started.items():
                server.resume()
                load.load(server.port, requests, CLIENTS, 1)
                rates[setting].append(load.load(server.port, requests, CLIENTS, args.seconds).rate)
                server.pause()
            print(f"round {number + 1} of {args.rounds}", flush=True)
    table = Table("processes", "views in a batch", f"answers/s at {CLIENTS}")
    for (count, batch), values in rates.items():
        table.add_row(str(count), str(batch), f"{statistics.median(values):,.0f}")
    tables.print_table(table)
    count, batch = max(rates, key=lambda setting: statistics.median(rates[setting]))
    print(f"python -m serving.server --processes {count} --max-batch {batch}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
