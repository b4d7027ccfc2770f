"""alpha-entmax, the sparse alternative to softmax (Peters et al. 2019, arXiv:1905.05702, eq. 9).

``p_j = [(alpha - 1) z_j - tau]_+ ** (1 / (alpha - 1))`` with the threshold ``tau`` that makes the
weights sum to 1.
"""

from torch import Tensor

from diffalign.kernels.entmax import naive, newton


def entmax(z: Tensor, alpha: float = 1.5, *, mask: Tensor | None = None) -> Tensor:
    """Weights [..., L] >= 0 that sum to 1 over the last axis of the scores ``z`` [..., L], many of
    them exactly 0.

    ``alpha`` is 1.5 (entmax) or 2 (sparsemax). ``mask`` is boolean, broadcasts to ``z`` and is True
    where a key may be used; masked keys get exactly 0, a row without any key gets zeros. Scores may
    be as low as -inf, but a row of -inf only belongs in ``mask``. Works in float32 (float64 for
    float64 scores) and returns the dtype of ``z``. Differentiable once, with the closed-form
    gradient.
    Cost: Newton sweeps over the scores, see ``newton.solve``; ``naive.entmax`` is the exact sorting
    form.

    Raises:
        ValueError: another ``alpha``, or no scores.
        TypeError: ``z`` is not floating point or ``mask`` is not boolean.
    """
    return newton.entmax(z, alpha, mask=mask)


__all__ = ["entmax", "naive", "newton"]
