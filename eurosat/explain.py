"""Show which parts of tiles a network used, as Grad-CAM++ pages (Chattopadhay et al. 2018)."""

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from eurosat import tracking
from eurosat.errors import DataError
from eurosat.runtime import cli, exit_codes, logs

if TYPE_CHECKING:
    from eurosat.evaluation.gradcam import Tiles
    from eurosat.models.network import NetworkSpec

MAX_TILES = 100
"""Largest number of tiles on a page."""


def read_tiles(
    run_id: str, spec: "NetworkSpec", names: Sequence[str]
) -> tuple["Tiles", list[str | None]]:
    """Read files, or tiles of the run's data by name; return pixels and true classes.

    The true class is the name of the folder, or None where that is not a class of the network.

    Raises:
        DataError: a name is neither a file nor a tile, or its size or bands do not fit.
    """
    import numpy as np

    from eurosat.data.decode import decode
    from eurosat.data.sources import open_source, read_file
    from eurosat.evaluation.recorded import recorded_data

    config = recorded_data(run_id)
    source = None
    tiles, expected = [], []
    for name in names:
        if Path(name).is_file():
            data = read_file(Path(name))
        else:
            source = source or open_source(config)
            if name not in source.paths:
                raise DataError(
                    f"{name} is neither a file nor a tile of {source.name}: "
                    f"give a path or a name such as {source.paths[0]}"
                )
            data = source.read(name)
        pixels = decode(data, name, **config.decode_options)
        if pixels.shape != (*spec.tile_size, spec.bands):
            raise DataError(
                f"{name} is {pixels.shape}, the network was trained on "
                f"{(*spec.tile_size, spec.bands)}: cut or resize the tile"
            )
        folder = Path(name).parent.name
        tiles.append(pixels)
        expected.append(folder if folder in spec.classes else None)
    return np.stack(tiles), expected


def main(argv: Sequence[str]) -> int:
    parser = cli.parser("eurosat.explain", __doc__ or "")
    parser.add_argument("model", metavar="MODEL", help="run id, runs:/ID or models:/NAME@ALIAS")
    parser.add_argument(
        "tiles",
        metavar="TILE",
        nargs="+",
        help="files, or names in the run's data such as Class/file",
    )
    parser.add_argument("--out", type=Path, help="also write the page to this folder")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if len(args.tiles) > MAX_TILES:
        raise DataError(
            f"{len(args.tiles)} tiles are more than the {MAX_TILES} of a page: give fewer"
        )
    from eurosat.evaluation.gradcam import draw_page, explain, render_html
    from eurosat.evaluation.recorded import recorded_network

    run_id = tracking.resolve_run(args.model)
    network, _ = recorded_network(run_id)
    tiles_NHWC, expected = read_tiles(run_id, network.spec, args.tiles)
    results = explain(network, tiles_NHWC, args.tiles, expected)
    title = f"{args.model}: what {network.spec.name} looked at"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        draw_page(results, title, folder / "explained.png")
        (folder / "explained.html").write_text(render_html(results, title))
        with tracking.append_to(run_id) as run:
            artifact_path = f"explanations/{datetime.now(UTC):%Y-%m-%dT%H-%M-%S-%f}"
            for file in (folder / "explained.png", folder / "explained.html"):
                run.log_file(file, artifact_path)
    for result in results:
        print(f"{result.tile}\t{result.expected or '-'}\t{result.label}\t{result.confidence:.4f}")
    also = f", and in {args.out}" if args.out else ""
    print(f"stored in run {run_id}: {artifact_path}/explained.html{also}")
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
