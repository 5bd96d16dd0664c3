"""Images that are computed a second time for the gradient instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def computed_again(x: Tensor, again: Callable[[], Tensor] | None) -> Iterator[None]:
    """
    Do not keep an image on the CPU for the gradient of what is computed in this context.

    Parameters
    ----------
    x : Tensor
    again : callable, optional
        Computes, without a gradient, what ``x`` is when it would be kept. Without it ``x`` is
        kept, as are those copies of it that autocast makes.
    """
    if again is None or x.device.type != "cpu":
        yield
        return
    recipe, pointer, shape = _Recipe(again), x.data_ptr(), x.shape

    def pack(saved: Tensor) -> Tensor | _Recipe:
        is_x = saved.data_ptr() == pointer and saved.shape == shape
        return recipe.ordered_once_more() if is_x else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


class _Recipe:
    """Computes an image when it is first asked for, and forgets it when it is last asked for."""

    def __init__(self, again: Callable[[], Tensor]):
        self.again = again
        self.n_orders = 0
        self.image: Tensor | None = None

    def ordered_once_more(self) -> "_Recipe":
        self.n_orders += 1
        return self

    def serve(self) -> Tensor:
        with torch.no_grad():
            image = self.again() if self.image is None else self.image
        self.n_orders -= 1
        self.image = image if self.n_orders > 0 else None
        return image


def _unpack(saved: "Tensor | _Recipe") -> Tensor:
    return saved.serve() if isinstance(saved, _Recipe) else saved
