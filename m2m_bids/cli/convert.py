"""Make a weights folder for m2m-bids from a uniGradICON, multiGradICON or M2M-Reg checkpoint."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """
    Run ``m2m-bids-convert``.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit code: 0, or 1 after one line on standard error.
    """
    args = _build_parser().parse_args(argv)
    from m2m_bids.registration.conversion import convert_checkpoint

    try:
        card = convert_checkpoint(
            args.checkpoint,
            args.folder,
            modalities=args.modalities,
            grid_size=args.grid_size,
            spacing_mm=args.spacing,
            training_data=args.training_data,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"m2m-bids-convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    n_unets = card.config["n_scales"] + card.config["n_last_steps"]
    print(
        f"{args.folder}: weights of {n_unets} U-Nets for {' and '.join(card.modalities)},"
        f" {card.grid_size} voxels of {card.spacing_mm:g} mm along every axis."
        f" Use them by: m2m-bids ... --weights {args.folder}"
    )
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m2m-bids-convert",
        description=__doc__,
        epilog="Images are given to the network as m2m-bids prepares them, scaled to [0, 1]. The"
        " weights of uniGradICON and multiGradICON are of 175 voxels along every axis: use"
        " --grid-size 175, and a spacing at which that holds the head.",
    )
    parser.add_argument("checkpoint", type=Path, help="file of torch.save, such as *.trch")
    parser.add_argument("folder", type=Path, help="new weights folder")
    parser.add_argument(
        "--modalities",
        nargs="+",
        required=True,
        choices=("pet", "fa"),
        help="what to register with T1w by these weights",
    )
    parser.add_argument(
        "--grid-size",
        type=int,
        required=True,
        metavar="N",
        help="voxels along every axis of the grid it was trained on",
    )
    parser.add_argument(
        "--spacing", type=float, required=True, metavar="MM", help="size of these voxels"
    )
    parser.add_argument(
        "--training-data",
        default="not stated",
        metavar="TEXT",
        help="what it was trained on, for the card; default: not stated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
