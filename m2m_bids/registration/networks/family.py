"""What the registry knows of a network: its name, its sizes and how to build it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def check_size(images: Tensor, config: Any) -> None:
    """
    Refuse images that are too small for a network.

    Parameters
    ----------
    images : Tensor, shape (N, 1, n, n, n)
    config : object
        Sizes of the network.

    Raises
    ------
    ValueError
        If they have fewer voxels along an axis than ``config.smallest_image``.
    """
    size = images.shape[-1]
    if size < config.smallest_image:
        raise ValueError(
            f"images must be larger than {config.smallest_image - 1} voxels, got {size}"
        )


@dataclass(frozen=True)
class NetworkFamily:
    """
    One architecture in all its sizes; a module of this package defines its own as ``FAMILY``.

    Parameters
    ----------
    name : str
        Name on weights cards and the command line.
    config : type
        Frozen dataclass of the sizes, which it validates; its defaults are the paper's, and its
        ``smallest_image`` is how many voxels along an axis images must have.
    network : type
        Module built from one ``config`` instance.
    compact : object
        Instance of ``config`` that trains on a CPU.
    """

    name: str
    config: type
    network: type[nn.Module]
    compact: Any

    def build(self, config: dict) -> nn.Module:
        """
        Build the network of a weights card.

        Parameters
        ----------
        config : dict
            Sizes by name; those left out are the paper's.

        Returns
        -------
        Module
            Freshly initialised.

        Raises
        ------
        TypeError
            If a size is unknown.
        ValueError
            If the sizes do not fit together.
        """
        return self.network(self.config(**config))

    def paper(self) -> Any:
        """
        Return the sizes of the paper.

        Returns
        -------
        object
            Instance of ``config``.
        """
        return self.config()
