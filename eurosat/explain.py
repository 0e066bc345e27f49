"""Where a network looked: Grad-CAM++ pages of tiles (Chattopadhay et al. 2018)."""

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
"""Tiles on a page."""


def read_tiles(
    run_id: str, spec: "NetworkSpec", names: Sequence[str]
) -> tuple["Tiles", list[str | None]]:
    """Pixels of files, or of tiles of the run's data by name, and the class their folder tells.

    Raises:
        DataError: a tile that is neither, or not of the network's size and bands.
    """
    import numpy as np

    from eurosat.data.decode import decode
    from eurosat.data.sources import open_source
    from eurosat.evaluation.recorded import recorded_data

    config = recorded_data(run_id)
    source = None
    tiles, expected = [], []
    for name in names:
        if Path(name).is_file():
            data = Path(name).read_bytes()
        else:
            source = source or open_source(config)
            if name not in source.paths:
                raise DataError(
                    f"{name} is neither a file nor a tile of {source.name}: "
                    f"give a path, or a name such as {source.paths[0]}"
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
    parser.add_argument("tiles", metavar="TILE", nargs="+", help="files, or names as Class/file")
    parser.add_argument("--out", type=Path, help="also write the page into this folder")
    args = parser.parse_args(argv)
    logs.setup(args.log_level)
    if len(args.tiles) > MAX_TILES:
        raise DataError(
            f"{len(args.tiles)} tiles are too many for a page of {MAX_TILES}: give fewer"
        )
    from eurosat.evaluation.gradcam import draw_page, explain, render_html
    from eurosat.evaluation.recorded import recorded_network

    run_id = tracking.resolve_run(args.model)
    network, _ = recorded_network(run_id)
    tiles_NHWC, expected = read_tiles(run_id, network.spec, args.tiles)
    explained = explain(network, tiles_NHWC, args.tiles, expected)
    title = f"{args.model}: where {network.spec.name} looked"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        draw_page(explained, title, folder / "explained.png")
        (folder / "explained.html").write_text(render_html(explained, title))
        with tracking.append_to(run_id) as run:
            kept = f"explanations/{datetime.now(UTC):%Y-%m-%dT%H-%M-%S-%f}"  # a page a call
            for file in (folder / "explained.png", folder / "explained.html"):
                run.log_file(file, kept)
    for one in explained:
        print(f"{one.tile}\t{one.expected or '-'}\t{one.label}\t{one.confidence:.4f}")
    print(f"in run {run_id}: {kept}/explained.html" + (f", {args.out}" if args.out else ""))
    return exit_codes.OK


if __name__ == "__main__":
    cli.run_command(main)
