"""Judge a training state of ``emoji-video``, or a pipeline folder, on fixed sentences.

``python -m diffalign.embedded.workshop.score_video --out FOLDER --teacher FOLDER`` decodes the key
pictures with the autoencoder of ``emoji``, so the denoiser can be judged before the autoencoder of
clips is there; with ``--vae FOLDER``, or with ``--pipeline FOLDER``, whole clips are judged.
``--reconstruct N`` judges N rendered clips after the autoencoder instead, the best that a denoiser
can reach: once from the latents of ``--teacher``, once from those of the encoder.

One JSON line with the share of right clips of each category is appended to ``scores.jsonl``; a
sheet of four frames of each and GIFs are written beside it. With 16 sentences a category a share
has a standard error of up to .125.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AnyFlowFARPipeline, AutoencoderKLWan, AutoencoderTiny
from PIL import Image, ImageDraw
from torch import Tensor

from diffalign.core.types import Json
from diffalign.embedded.load import load, pipeline_in
from diffalign.embedded.nets.video_judge import ClipVerdict, VideoJudge
from diffalign.embedded.workshop.train_vae import pixels
from diffalign.embedded.workshop.train_video import export
from diffalign.embedded.workshop.train_video_vae import key_latents, teacher
from diffalign.embedded.workshop.training import STATE, saved_state
from diffalign.embedded.workshop.video_parts import LENGTH
from diffalign.embedded.world.clips import EVERY, FRAMES, Clip, ClipWorld
from diffalign.embedded.world.scenes import HELD_OUT, SIZE
from diffalign.embedded.world.stories import KINDS, reading, telling

CATEGORIES = tuple(dict.fromkeys(KINDS.values()))


def sentences(each: int) -> list[tuple[str, str]]:
    """``each`` plain sentences of every category, each with its category; always the same.

    ValueError for less than one.
    """
    if each < 1:
        raise ValueError(f"each: expected at least 1 sentence a category, got {each}")
    result = []
    for number, category in enumerate(CATEGORIES):
        mix = {kind: 1.0 for kind, name in KINDS.items() if name == category}
        clips = ClipWorld(mix).clips(HELD_OUT.start + number, each)
        result += [(telling(clip.story), category) for clip in clips]
    return result


@torch.no_grad()
def videos(
    pipe: AnyFlowFARPipeline,
    prompts: Sequence[str],
    scale: float,
    steps: int,
    seed: int,
    decoder: AutoencoderTiny | None = None,
    batch: int = 8,
) -> Tensor:
    """A video of each prompt, [B, T, 3, 64, 64] in [0, 1]: 13 frames, or with ``decoder`` the four
    key pictures by that autoencoder."""
    results = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        frames = pipe(
            prompt=part,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=generators,
            max_sequence_length=LENGTH,
            output_type="pt" if decoder is None else "latent",
        ).frames
        if decoder is not None:
            flat = frames.transpose(1, 2).flatten(0, 1)
            pictures = decoder.decode(flat.to(decoder.dtype)).sample.float()
            frames = pictures.add(1).div(2).clamp(0, 1).unflatten(0, (len(part), -1))
        results.append(frames.float())
    return torch.cat(results)


@torch.no_grad()
def reconstructed(
    vae: AutoencoderKLWan, clips: Sequence[Clip], source: AutoencoderTiny | None = None
) -> Tensor:
    """Rendered clips as ``vae`` draws them, [B, 13, 3, 64, 64] in [0, 1]: from the latents of
    ``source``, or else from its own."""
    results = []
    for clip in clips:
        if source is not None:
            latents = key_latents(source, [clip]).transpose(1, 2)
        else:
            frames = pixels(clip.pictures(), torch.float32)[None].transpose(1, 2)
            latents = vae._encode(frames.contiguous()).chunk(2, 1)[0]
        results.append(vae.decode(latents).sample.add(1).div(2).transpose(1, 2))
    return torch.cat(results)


def summary(verdicts: Sequence[ClipVerdict], categories: Sequence[str]) -> Json:
    """Share of right clips of each category and their mean, and shares of the right facts."""
    pairs = list(zip(verdicts, categories, strict=True))
    shares = {
        category: [verdict.right for verdict, name in pairs if name == category]
        for category in dict.fromkeys(categories)
    }
    result: Json = {name: _mean(values) for name, values in shares.items()}
    result["mean"] = _mean([verdict.right for verdict in verdicts])
    for name in ("objects", "colours", "motions"):
        facts = [f for verdict in verdicts for f in getattr(verdict, name) if f is not None]
        result[f"fact_{name}"] = _mean(facts)
    result["fact_order"] = _mean([v.order for v in verdicts if v.order is not None])
    return result


def _mean(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def sheet(films: Tensor, prompts: Sequence[str], verdicts: Sequence[ClipVerdict]) -> Image.Image:
    """Four frames of each video beside its prompt, green where it is right."""
    count = films.shape[1]
    places = [round(i * (count - 1) / 3) for i in range(4)]
    width, columns = 4 * SIZE + 8, 4
    result = Image.new("RGB", (columns * width, -(-len(films) // columns) * (SIZE + 26)), "white")
    pen = ImageDraw.Draw(result)
    for i, (film, prompt, verdict) in enumerate(zip(films, prompts, verdicts, strict=True)):
        x, y = i % columns * width, i // columns * (SIZE + 26)
        for k, place in enumerate(places):
            result.paste(picture(film[place]), (x + k * SIZE, y))
        text, colour = prompt.removeprefix("a photo of "), "darkgreen" if verdict.right else "red"
        for line in range(2):
            pen.text((x, y + SIZE + 12 * line), text[42 * line : 42 * line + 42], fill=colour)
    return result


def picture(frame: Tensor) -> Image.Image:
    """A frame [3, H, W] in [0, 1]."""
    return Image.fromarray(frame.mul(255).round().byte().permute(1, 2, 0).numpy())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--out", type=Path, required=True, help="folder of the training state, and of the answers")
    add("--pipeline", type=Path, help="a pipeline folder to judge instead of a training state")
    add("--teacher", type=Path, help="folder of the autoencoder of emoji: judge key pictures")
    add("--vae", type=Path, help="folder of the autoencoder of clips: judge whole clips")
    add("--reconstruct", type=int, default=0, help="judge so many rendered clips instead")
    add("--judge", default="emoji-judge", help="name of an embedded detector")
    add("--each", type=int, default=16, help="sentences a category")
    add("--scale", type=float, nargs="+", default=[3.0], help="guidance scales")
    add("--steps", type=int, default=10)
    add("--seed", type=int, default=0)
    add("--width", type=int, default=160)
    add("--layers", type=int, default=6)
    add("--raw", action="store_true", help="the last weights instead of the averaged ones")
    return result


def _opened(options: argparse.Namespace) -> tuple[AnyFlowFARPipeline, Json]:
    """The pipeline to judge, and what a line of the scores says of it."""
    if options.pipeline is not None:
        return pipeline_in(options.pipeline), {"pipeline": options.pipeline.name}
    if options.vae is None and options.teacher is None:
        raise ValueError("vae: expected --vae, --teacher or --pipeline to decode with, got none")
    pipe = export(options, None, averaged=not options.raw)
    updates = saved_state(options.out / STATE)["trainer"]["done"]
    return pipe, {"updates": updates, "averaged": not options.raw}


def _reconstruct(options: argparse.Namespace) -> None:
    """Append a line for either source of latents."""
    if options.vae is None or options.teacher is None:
        raise ValueError("reconstruct: expected --vae and --teacher as well, got less")
    vae, judge = AutoencoderKLWan.from_pretrained(options.vae), VideoJudge(load(options.judge))
    clips = list(ClipWorld().clips(HELD_OUT.start, options.reconstruct))
    for source in (teacher(options.teacher), None):
        films = reconstructed(vae, clips, source)
        verdicts = judge.verdicts(films, [clip.story for clip in clips])
        line = {"latents": "encoder" if source is None else "teacher", "clips": len(clips)}
        with (options.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(line | summary(verdicts, [c.kind for c in clips])) + "\n")
        name = f"reconstructed-{line['latents']}.png"
        sheet(films, [clip.caption for clip in clips], verdicts).save(options.out / name)


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.reconstruct:
        torch.set_num_threads(1)
        _reconstruct(options)
        return
    prompts, categories = zip(*sentences(options.each), strict=True)
    torch.set_num_threads(1)
    pipe, facts = _opened(options)
    pipe.set_progress_bar_config(disable=True)
    keys = options.vae is None and options.pipeline is None
    decoder = teacher(options.teacher) if keys else None
    judge = VideoJudge(load(options.judge), late=1 if keys else EVERY)
    name = f"{facts['updates']:06d}" if "updates" in facts else facts["pipeline"]
    for scale in options.scale:
        start = time.monotonic()
        films = videos(pipe, prompts, scale, options.steps, options.seed, decoder)
        verdicts = judge.verdicts(films, [reading(prompt) for prompt in prompts])
        line = facts | {"scale": scale, "steps": options.steps, "keys": keys}
        line |= summary(verdicts, categories)
        line |= {"clips": len(prompts), "seconds": round(time.monotonic() - start, 1)}
        with (options.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        sheet(films, prompts, verdicts).save(options.out / f"sheet-{name}-{scale:g}.png")
        for i, film in enumerate(films):
            first, *rest = [picture(frame).resize((2 * SIZE, 2 * SIZE)) for frame in film]
            path = options.out / f"clip-{name}-{scale:g}-{i:02d}.gif"
            first.save(path, save_all=True, append_images=rest, duration=120, loop=0)


if __name__ == "__main__":
    main()
