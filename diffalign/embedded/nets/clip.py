"""``emoji-clip``: an open_clip dual encoder of 64 x 64 scenes and captions, and ``emoji-clip-2``
of 128 x 128 ones, the same network with patches of twice the side.

The folder is one that open_clip loads by itself (``open_clip.create_model("local-dir:FOLDER")``,
``open_clip.get_tokenizer`` likewise); the extra file ``heads.safetensors`` holds linear readers of
objects, colours and numbers from the same image embedding. 3.1 M parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.core.types import Json
from diffalign.embedded.nets.judge import SIDE, checked
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

if TYPE_CHECKING:
    from open_clip.model import CLIP
    from open_clip.tokenizer import HFTokenizer

CONTEXT, PATCHES = 24, 8
"""Tokens of a caption, and patches along each side of an image."""
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def model_config(vocabulary: int, side: int = SIDE) -> Json:
    """The ``model_cfg`` of open_clip for images of ``side`` pixels and a tokenizer with
    ``vocabulary`` entries whose end token is 1."""
    return {
        "embed_dim": 192,
        "vision_cfg": {
            "image_size": side,
            "patch_size": side // PATCHES,
            "width": 192,
            "layers": 5,
            "head_width": 48,
            "mlp_ratio": 3.0,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "emoji-clip",
            "width": 160,
            "heads": 4,
            "layers": 3,
            "mlp_ratio": 3.0,
            "pool_type": "eos",
            "eos_id": 1,
            "pad_id": 1,
        },
    }


class Heads(nn.Module):
    """Linear readers of the image embedding [B, 192] before normalisation: ``pairs`` [B, 80, 11]
    logits that an object of this class and colour (native last) is there, ``numbers`` [B, 80, 5]
    logits of the number of objects of the class, 0 to 4."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.pairs = nn.Linear(width, len(OBJECTS) * (len(COLOURS) + 1))
        self.numbers = nn.Linear(width, len(OBJECTS) * 5)
        nn.init.constant_(
            self.pairs.bias, -6.0
        )  # about two of 880 are there: start from that rate, or they drown the rest of the loss

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(embedding), len(OBJECTS), -1)
        return self.pairs(embedding).view(shape), self.numbers(embedding).view(shape)


def build_clip(vocabulary: int, seed: int, side: int = SIDE) -> tuple[CLIP, Heads]:
    """The untrained open_clip model for images of ``side`` pixels and its heads in fp32; initial
    weights from ``seed`` without touching the global generator."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    config = model_config(vocabulary, side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(
            config["embed_dim"],
            CLIPVisionCfg(**config["vision_cfg"]),
            CLIPTextCfg(**config["text_cfg"]),
        )
        return model, Heads(config["embed_dim"])


class Clip:
    """A trained ``emoji-clip``. ``model`` and ``tokenizer`` are open_clip's own objects."""

    def __init__(self, model: CLIP, tokenizer: HFTokenizer, heads: Heads) -> None:
        self.model, self.tokenizer, self.heads = (
            model.eval().requires_grad_(False),
            tokenizer,
            heads.eval().requires_grad_(False),
        )
        # of the images that the network sees; others are resized
        self.side: int = self.model.visual.image_size[0]

    def image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to embeddings [B, 192], differentiable."""
        pixels = checked(images, "emoji-clip", self.side)
        mean, std = (
            torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(1, 3, 1, 1)
            for values in (MEAN, STD)
        )
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # on a CPU the fused backward is slower than the plain form for heads of 48
            embedding: Tensor = self.model.encode_image((pixels - mean) / std)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Captions to unit embeddings [B, 192]; words after the 22nd are cut."""
        device = self.model.token_embedding.weight.device
        embedding: Tensor = self.model.encode_text(
            self.tokenizer(list(captions)).to(device), normalize=True
        )
        return embedding

    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image and its caption, [B] in [-1, 1], differentiable in the images.

        ValueError if the lengths differ.
        """
        if len(images) != len(captions):
            raise ValueError(
                f"emoji-clip needs one caption per image; got {len(images)} images and "
                f"{len(captions)} captions."
            )
        return (self.image(images) * self.text(captions)).sum(-1)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' logits: class and colour [B, 80, 11], number [B, 80, 5]; differentiable in the
        images."""
        answer: tuple[Tensor, Tensor] = self.heads(self.image(images, normalize=False))
        return answer


def load_clip(folder: Path) -> Clip:
    """The dual encoder saved in ``folder``, in fp32 on the CPU, loaded by open_clip."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        model = open_clip.create_model(f"local-dir:{folder}", precision="fp32")
        heads = Heads(model.text_projection.shape[-1])
    heads.load_state_dict(
        {name: value.float() for name, value in load_file(folder / "heads.safetensors").items()}
    )
    return Clip(model, open_clip.get_tokenizer(f"local-dir:{folder}"), heads)
