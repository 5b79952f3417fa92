"""`consistency_variance`: how far apart several views of each sample lie, without stacking them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..common.checks import check_flag, check_number, check_views
from ..dispatch import select


def consistency_variance(
    views: Tensor | Sequence[Tensor], correction: float = 1, *, detach: bool = False, impl: str | None = None
) -> Tensor:
    """Variance of each sample over its views, mean over the dimensions: ``mean_d Var_v(x_vbd)``.

    Every view is read once and nothing is stacked; sums are taken of differences from the first view, so that values
    far from 0 lose no digits.

    Args:
        views: [V, B, D], or V tensors [B, D], 2 <= V <= 16. float16, bfloat16, float32 or float64, any strides, each
            view its own.
        correction: 0 to below V; the variance divides by ``V - correction``: 1 is unbiased, 0 the mean square.
        detach: only the first view gets gradient; the others are targets.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the device.

    Returns:
        [B], float32 (float64 if any view is float64); inf where a sample's squared differences, over all its views and
        dimensions, overflow when added up. Gradients for the views.

    Raises:
        ValueError: a shape, device or number that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why.

    Example:
        >>> consistency_variance([encode(x), encode(flip(x)), encode(crop(x))])
    """
    check_number("correction", correction)
    check_flag("detach", detach)
    if isinstance(views, Tensor) and views.dim() != 3:
        raise ValueError(f"views must have shape [V, B, D], or be V tensors [B, D], got shape {list(views.shape)}")
    if not isinstance(views, (Tensor, list, tuple)):
        raise TypeError(f"views must be a [V, B, D] tensor or a list of V tensors [B, D], got {type(views).__name__}")
    given = [views] if isinstance(views, Tensor) else list(views)
    if not given or not all(isinstance(view, Tensor) for view in given) or (len(given) == 1 and len(given[0]) == 0):
        check_views(given, correction)  # raises
    if detach:
        first, *rest = given[0].unbind(0) if len(given) == 1 and given[0].dim() == 3 else given
        given = [first, *(view.detach() for view in rest)]
    serve: Callable[..., Tensor] = select.resolve("consistency_variance", given[0].device.type, impl)
    return serve(given, float(correction))
