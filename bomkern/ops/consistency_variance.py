"""`consistency_variance`: the variance of each sample over several views, without stacking them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..common.checks import check_flag, check_number, check_views
from ..dispatch import select


def consistency_variance(
    views: Tensor | Sequence[Tensor], correction: float = 1, *, detach: bool = False, impl: str | None = None
) -> Tensor:
    """Compute the variance of each sample over its views, averaged over the dimensions: ``mean_d Var_v(x_vbd)``.

    Every view is read once and nothing is stacked. The sums are of differences from the first view, so that values far
    from 0 lose no digits.

    Args:
        views: [V, B, D], or V tensors [B, D], 2 <= V <= 16. float16, bfloat16, float32 or float64, any strides,
            which may differ between views.
        correction: from 0 to below V. Sums are divided by ``V - correction``: 1 is unbiased, 0 gives the mean square.
        detach: give gradient to the first view only; the others are targets.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the device.

    Returns:
        [B], float32 (float64 if any view is float64). A sample is inf if the sum of its squared differences, over all
        its views and dimensions, overflows. The views get gradient.

    Raises:
        ValueError: an argument has an invalid shape, device or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why.

    Example:
        >>> consistency_variance([encode(x), encode(flip(x)), encode(crop(x))])
    """
    correction = check_number("correction", correction)
    check_flag("detach", detach)
    if isinstance(views, Tensor) and views.dim() != 3:
        fix = "write .flatten(1, -2)" if views.dim() > 3 else "pass the views in a list"
        raise ValueError(
            f"views must have shape [V, B, D], or be V tensors [B, D], got shape {list(views.shape)}: {fix}"
        )
    if not isinstance(views, (Tensor, list, tuple)):
        raise TypeError(f"views must be a [V, B, D] tensor or a list of V tensors [B, D], got {type(views).__name__}")
    parts = [views] if isinstance(views, Tensor) else list(views)
    if not parts or not all(isinstance(view, Tensor) for view in parts) or (len(parts) == 1 and len(parts[0]) == 0):
        check_views(parts, correction)  # raises
    if detach:
        first, *rest = parts[0].unbind(0) if len(parts) == 1 and parts[0].dim() == 3 else parts
        parts = [first, *(view.detach() for view in rest)]
    serve: Callable[..., Tensor] = select.resolve("consistency_variance", parts[0].device.type, impl)
    return serve(parts, float(correction))
