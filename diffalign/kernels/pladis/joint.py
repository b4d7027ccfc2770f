"""PLADIS inside joint attention: image queries re-weigh their text keys, each row keeping the mass
it had on text.

The pattern follows third-party ports of the authors' Flux code (the paper describes
cross-attention). The mass comes out of the user's own attention call: an indicator column appended
to the values is averaged with the attention weights, so no log-sum-exp is needed.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from diffalign.kernels.pladis.eager import pladis

# appended value columns: one indicator, the rest zero, so that 16-bit rows stay 16-byte aligned
PAD = 8


def pladis_joint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text: slice,
    image: slice,
    strength: float,
    alpha: float = 1.5,
    mask: Tensor | None = None,
    scale: float | None = None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    call: Callable[..., Tensor] = pladis,
) -> Tensor:
    """Joint attention [B, A, S, D] over a sequence whose ``text`` and ``image`` parts are the given
    slices of its S tokens.

    ``attend(q, k, v)`` is dense attention with the mask and scale already bound; it must take
    values of D + 8 columns. Default: torch SDPA with ``mask`` and ``scale``. ``mask`` is a key
    mask, [B, 1, 1, S] or broadcastable to it (boolean, or an additive bias). ``call`` is a chosen
    ``PladisCall``. Text rows, and all columns but the text of image rows, keep their dense weights;
    strength 0 is dense attention.
    Cost: dense attention plus one ``call`` over [image, text] scores and one copy of the values. On
    CUDA, values wider than the queries rule out torch's flash backend, so that its memory-efficient
    one runs.

    Raises:
        ValueError: a mask with different values per query, or whatever ``call`` raises.
    """
    if mask is not None and mask.shape[-2:-1] not in ((), (1,)):
        raise ValueError(
            "pladis_joint: mask must be a key mask that broadcasts to [B, 1, 1, S]; got "
            f"{list(mask.shape)}."
        )
    if attend is None:
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=scale)
    if strength == 0:
        return attend(q, k, v)
    width = v.shape[-1]
    padded = F.pad(v, (0, PAD))
    padded[..., text, width] = 1
    joint = attend(q, k, padded)
    out = joint[..., :width].clone()
    out[..., image, :] = call(
        q[..., image, :],
        k[..., text, :],
        v[..., text, :],
        strength=strength,
        alpha=alpha,
        mask=None if mask is None else mask[..., text],
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        base=joint[..., image, :width],
        mass=joint[..., image, width],
    )
    return out
