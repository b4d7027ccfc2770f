"""The pages of the results: tables, sentences and plots, made of the stored numbers.

python benchmarks/pages.py [--check] [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import advice
from PIL import Image
from results import FOLDER, Estimate, Result, Row, read

from diffalign.drawing.charts import Curve, line_chart, stacked

# columns that say which rows belong together, and are no figures
HIDDEN = ("scale", "space", "threshold", "n", "group")


def cell(value: Any, unit: str = "") -> str:
    """An estimate to three decimals, another number to four significant digits, nothing a dash."""
    if isinstance(value, Estimate):
        return format(value, "+.3f" if unit.startswith("difference") else ".3f")
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def table(rows: Sequence[Row], units: dict[str, str]) -> str:
    """Rows as a Markdown table."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = (cell(row.get(key), units.get(key, "")) for key in keys)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(result: Result, title: str, *paragraphs: str, rows: Sequence[Row] = ()) -> str:
    """A page: title, paragraphs, table, what the columns mean, and how it was measured."""
    rows = rows or result.rows
    columns = {key for row in rows for key in row} - set(HIDDEN)
    meanings = [f"{k}: {v}" for k, v in result.units.items() if k in columns or "..." in k]
    if any(isinstance(value, Estimate) for row in rows for value in row.values()):
        meanings.append("in brackets: 95% bootstrap interval over prompts")
    where = result.environment
    made = (
        f"{where['device']}; torch {where['versions']['torch']}, "
        f"diffusers {where['versions']['diffusers']}; commit {where['commit']}; "
        f"`{where['command']}`"
    )
    parts = [f"# {title}", *paragraphs, table(rows, result.units), "; ".join(meanings) + ".", made]
    return "\n\n".join(parts) + "\n"


def model_of(result: Result) -> str:
    """The embedded model that was measured, and its numbers where they are not float32."""
    names = [result.options.get("model", "emoji"), result.options.get("dtype", "float32")]
    return " in ".join(name for name in names if name != "float32")


def guarantee(result: Result) -> str:
    options = result.options
    title = f"Promised thresholds of AdaptiveGuidance on {model_of(result)}"
    text = (
        f"{options['splits']} random splits into halves: one chooses the threshold, the other is "
        "where its loss is read. At 95% confidence a share of .05 may be broken."
    )
    return page(result, title, text)


def policy(result: Result) -> str:
    title = f"A searched policy on {model_of(result)}, {result.options['steps']} steps"
    (searched,) = (row for row in result.rows if row["shares"])
    shares = ", ".join(f"{share:g}" for share in searched["shares"])
    rows = [{k: v for k, v in row.items() if k != "shares"} for row in result.rows]
    adaptive = result.row("adaptive")
    gap = searched["score"].value - adaptive["score"].value
    text = (
        f"At {searched['NFE']:g} evaluations it is {abs(gap):.3f} {'below' if gap < 0 else 'above'}"
        f" AdaptiveGuidance at {adaptive['NFE']:.1f}. Shares of the weight, step by step: {shares}."
    )
    return page(result, title, text, rows=rows)


def guidance(result: Result) -> str:
    facts = result.facts
    rows = [
        row | {"advice": advice.guidance(row, result) if row["technique"] else None}
        for row in result.rows
    ]
    title = (
        f"Guidance on {model_of(result)}: {facts['prompts']} GenEval prompts x {facts['seeds']} "
        f"seeds, {facts['comparisons']} comparisons"
    )
    text = (
        f"Best of the CFG sweep: {facts['best']}. Plots: [against cost](guidance-cost.png), "
        "[against effective scale](guidance-scale.png)."
    )
    return page(result, title, text, rows=rows)


def adaptive(result: Result) -> str:
    title = f"AdaptiveGuidance on {model_of(result)}, {result.options['steps']} steps"
    return page(result, title, advice.adaptive(result), "![Score against cost](adaptive.png)")


def dynamic(result: Result) -> str:
    title = f"DynamicCFG on {model_of(result)}, {result.options['steps']} steps"
    return page(result, title, advice.dynamic(result), "![Weights by step](dynamic.png)")


def schedules(result: Result) -> str:
    title = (
        f"Guidance weights over the steps on {model_of(result)}, {result.options['steps']} steps"
    )
    return page(result, title, advice.schedules(result))


def geneval(result: Result) -> str:
    facts, options = result.facts, result.options
    return page(
        result,
        f"{model_of(result)} on GenEval: {facts['prompts']} prompts x {facts['samples']}, CFG "
        f"{options['scale']:g}, {options['steps']} steps, {facts['seconds per image']:.2f} s per "
        "image",
    )


def negation(result: Result) -> str:
    facts = result.facts
    return page(
        result,
        "What was negated is gone, the other object is kept: "
        f"{facts['object images']} images for objects, {facts['colour images']} for colours; "
        f"{model_of(result)}, {result.options['steps']} steps",
        advice.negation(result),
        "![Share by effective strength](negation.png)",
        "![The same noise under four ways](negation-images.png)",
    )


def pladis(result: Result) -> str:
    facts = result.facts
    title = (
        f"PLADIS on {model_of(result)}: {facts['prompts']} GenEval prompts x {facts['seeds']} seeds"
    )
    text = f"{facts['default']}: {advice.pladis(result)} Best of the CFG sweep: {facts['best']}."
    return page(result, title, text)


def cost(result: Result) -> str:
    options = result.options
    return page(
        result,
        f"Time on emoji, B = {options['batch']}, {options['steps']} steps, latents only, median of "
        f"{options['runs']} rounds",
        rows=[row | {"held": advice.bar_held(row)} for row in result.rows],
    )


def nag_cost(result: Result) -> str:
    options = result.options
    depth = "a few of the blocks" if options["quick"] else "all blocks"
    text = (
        f"Seconds: models with a quarter of the tokens and channels and {depth}, "
        f"{options['rounds']} rounds. The authors' code was counted and timed elsewhere, on sizes "
        "of its own; their layout is counted here, on the same model."
    )
    return page(result, "What NAG costs beside a plain step, 1024 x 1024, one image", text)


def pruning(result: Result) -> str:
    return page(
        result,
        "A step that leaves image tokens out, one row",
        f"Random weights at the true width: time alone, measured with {result.facts['blocks']} "
        "blocks, of which the first stands for all that are missing; steps with all tokens and "
        "with some took turns. Fewer steps take as long as CAT where the columns `run of ...` say "
        "so; which of the two is nearer to the full run stands in [another "
        "table](pruning_quality.md). `of bound` can pass 1: a full step of PixArt reads keys that "
        "lie apart, a pruned one does not; and one round varies by some percent under other load.",
    )


def pruning_quality(result: Result) -> str:
    facts, options = result.facts, result.options
    return page(
        result,
        f"Time saved and what is lost on {options['model']}: {facts['prompts']} GenEval prompts x "
        f"{facts['samples']} seeds, CFG {options['scale']:g}",
        advice.pruning(result),
        "Each way beside fewer steps that take as many seconds, on the same prompts and seeds. "
        "Seconds are rough: ways of equal operations differ by up to a fifth in them, and the "
        "intervals do not know of that.",
        "![Quality against seconds](pruning-quality.png)",
    )


def plot_pruning_quality(result: Result) -> dict[str, Image.Image]:
    """PSNR and the judge against seconds, one picture for each length of the full run."""
    pictures = []
    for steps in dict.fromkeys(row["steps"] for row in result.rows):
        for key, label in (
            ("PSNR", "PSNR to the full run, dB"),
            ("judge", "share of right images"),
        ):
            rows = [row for row in result.rows if row["steps"] == steps]
            if key == "PSNR":  # that of the full run to itself is not one
                rows = [row for row in rows if row["group"] != "full"]
            curves = []
            # the full run last, so that a group has the same colour in both
            groups = dict.fromkeys(row["group"] for row in rows)
            for group in sorted(groups, key=lambda group: group == "full"):
                mine = [row for row in rows if row["group"] == group]
                mine.sort(key=lambda row: row["seconds"])
                points = [(row["seconds"], row[key].value) for row in mine]
                joined = group not in ("other choices", "AdaptiveGuidance")
                names = () if joined else [row["method"] for row in mine]
                curves.append(Curve(group, points, line=joined, names=names))
            title = f"{result.options['model']}, {steps} steps in full"
            pictures.append(line_chart(curves, title=title, x_label="seconds", y_label=label))
    return {"pruning-quality": stacked(pictures)}


def pruning_caches(result: Result) -> str:
    facts = result.facts
    return page(
        result,
        f"CAT and the step caches of diffusers on a small network of Flux's form, {facts['steps']} "
        "steps",
        f"Random weights: time alone. The first {facts['full steps']} steps are full, but for "
        "FirstBlockCache, which has no such option. SeaCache needs the step and the noise level of "
        "each call, which FluxPipeline does not tell it: it computes everything.",
    )


def overhead(result: Result) -> str:
    return page(result, "Session overhead: plain CFG through a session against native CFG")


def search(result: Result) -> str:
    facts, options = result.facts, result.options
    ties = ", ".join(f"{name} {share:.2f}" for name, share in facts["share of ties"].items())
    own = ", ".join(f"{name} {share:.3f}" for name, share in facts["share of the driver"].items())
    best: list[Row] = [{"images": k} | v for k, v in facts["from one image to the best"].items()]
    # runs of earlier versions have none
    paces: list[Row] = [{"method": k} | v for k, v in facts.get("seconds per NFE", {}).items()]
    pace = (
        "Seconds per NFE beside best-of-N's, median over prompts. All methods draw 4 images in a "
        "round; in a tree those that begin below late states join later, so that batches are "
        "smaller, and they are decoded and scored after few evaluations."
    )
    return page(
        result,
        f"Search on {options['model']}: {facts['prompts']} GenEval prompts, 20 steps, scale "
        f"{options['scale']:g}",
        "One run per method and prompt, read at several budgets, where every run had an image by "
        "then. emoji-clip is optimised; the judges only look. emoji-clip learnt from verdicts of "
        "emoji-judge-audit on pictures of other prompts, from emoji-judge never.",
        f"Share of prompts whose highest score is shared by several images: {ties}.",
        f"Share of the seconds that is neither denoiser, decoder nor reward, median: {own}.",
        *((pace, table(paces, {})) if paces else ()),
        "Best-of-N at 1600 NFE, by judge and category: the share of right images (one), of images "
        "that emoji-clip chose among 40 (chosen), of prompts with a right one among the same 40 "
        "(best), and how much of the way from one to best is made.",
        table(best, {}),
        "![Score against NFE and seconds](search.png)",
    )


def video(result: Result) -> str:
    facts, options = result.facts, result.options
    return page(
        result,
        f"Videos of {Path(options['model']).name}: {facts['prompts']} sentences x "
        f"{options['seeds']}, {options['steps']} steps a chunk, scale {options['scale']:g}",
        *(_tree_note(row) for row in result.rows if row["method"].startswith("tree")),
    )


def _tree_note(row: Row) -> str:
    """Whether a tree keeps the score of linear search at a third of its rows, half its seconds."""
    name = row["method"]
    score, right = (
        "reaches" if row[column].value >= 0 else "does not reach"
        for column in ("to beside", "audit to beside")
    )
    rows = "at most" if row["share of rows"] <= 1 / 3 else "more than"
    seconds = "at most" if row["share of seconds"] <= 1 / 2 else "more than"
    return (
        f"{name}: {score} the mean likeness of linear search with 20 and {right} its share of "
        f"right clips by the audit judge, with {rows} a third of its rows and {seconds} half of "
        "its seconds."
    )


def noise_opt(result: Result) -> str:
    options = result.options
    images = options["images"]
    shares = {
        "carinox": f"carinox: {images} images from three starts.",
        "carinox, VJPs": "carinox, VJPs: one update of each start, as many backward passes as "
        "ReNO: each part of the reward needs one.",
        "find": f"find: {images} updates of four images at rate .004.",
        "find, tuned": "find, tuned: updates of eight images at rate .05.",
    }
    skips = any("skip" in row["method"] for row in result.rows)
    paragraphs = [
        f"ReNO renders {images} images, random search four times as many"
        + ("; with skip only the last step is differentiated exactly" if skips else "")
        + ". emoji-aware is optimised; emoji-judge is one of its parts, and the audit judge only "
        "looks.",
        " ".join(shares[row["method"]] for row in result.rows if row["method"] in shares),
        "The rate of 5, the starts of CARINOX at equal backward passes and the updates of find, "
        "tuned, were chosen on 18 tuning prompts of emoji-turbo.",
    ]
    return page(
        result,
        f"Noise optimisation on {options['model']}: {result.rows[0]['n']} GenEval prompts, "
        f"{options['steps']} step{'s' if options['steps'] > 1 else ''}, scale {options['scale']:g}",
        *paragraphs,
    )


def found_prompts(result: Result) -> str:
    counts = ", ".join(f"{row['method']} {row['n']}" for row in result.rows)
    examples = [f"{way}: " + "; ".join(texts) for way, texts in result.facts["examples"].items()]
    return page(
        result,
        f"Found prompts on {result.options['model']}: PEZ and SAGE on GenEval prompts",
        "PEZ has 400 updates of two restarts and six tokens, SAGE two rounds of six fillings and "
        f"two seeds each. Prompts: {counts}. Examples (planted: found):",
        *examples,
    )


def ratings(result: Result) -> str:
    options = result.options
    return page(
        result,
        f"Rewards against the audit judge on {options['model']}: {options['prompts']} tuning "
        f"prompts, {options['images']} images each, {options['steps']} steps, scale "
        f"{options['scale']:g}",
        "The weights are those of the reward emoji-aware. Readers: the objects of the prompt in "
        "any colour, in their colours, in their numbers; each part counts on its unit scale.",
    )


def plot_search(result: Result) -> dict[str, Image.Image]:
    """Reward and audit judge against NFE, and reward against seconds."""
    names = list(dict.fromkeys(row["method"] for row in result.rows))
    pictures = [
        line_chart(
            [
                Curve(
                    name,
                    [(row[x], row[y].value) for row in result.rows if row["method"] == name],
                )
                for name in names
            ],
            title=title,
            x_label=x,
            y_label=label,
            log="x",
        )
        for x, y, title, label in (
            ("NFE", "reward", "The reward that is optimised", "emoji-clip"),
            ("NFE", "audit", "The audit judge, which no method sees", "share of right images"),
            ("seconds", "reward", "The reward against processor seconds", "emoji-clip"),
        )
    ]
    return {"search": stacked(pictures)}


def kernels(result: Result) -> str:
    options = result.options
    gpu = options["device"] == "cuda"
    what = (
        f"run on a GPU: times in {options['dtype']}"
        if gpu
        else f"run on a CPU: ratios in {options['dtype']}"
    )
    share = f", 1/{options['share']} of the image tokens" if options["share"] > 1 else ""
    return page(
        result,
        f"Attention kernels, {what}{share}; {'median' if gpu else 'best'} of {options['runs']} "
        f"runs, seed {options['seed']}",
    )


def gpu(result: Result) -> str:
    options, left_out = result.options, result.facts["left out"]
    steps = [row for row in result.rows if row["part"] != "kernels" and "failed" not in row]
    wrong = [row for row in result.rows if "failed" in row]
    fused = [
        {k: v for k, v in row.items() if k not in ("part", "what")}
        for row in result.rows
        if row["part"] == "kernels" and "failed" not in row
    ]
    notes = [
        f"{' '.join(row[k] for k in ('part', 'model', 'what'))}: {row['failed']}" for row in wrong
    ]
    if left_out:
        names = "; ".join(" ".join(key.values()) for key in left_out)
        notes.append(f"Not measured in {options['seconds']:g} s: {names}.")
    if options["tiny"]:
        notes.append("Models of a few kilobytes: the path was run, no time means anything.")
    return page(
        result,
        f"Steps and kernels on {'a GPU' if options['device'] == 'cuda' else 'a CPU'}, "
        f"{options['dtype']}, {options['runs']} runs",
        "Random weights and few of the blocks at the true width: time alone.",
        *notes,
        table(fused, result.units),
        rows=steps,
    )


def plot_guidance(result: Result) -> dict[str, Image.Image]:
    """Score against effective scale and against cost, with plain CFG as a line."""
    best = result.facts["best"]
    plain = [row for row in result.rows if not row["technique"]]
    sweep = [row for row in plain if "," not in row["method"]]
    steps = [row for row in plain if row["method"].startswith(f"{best},")] + [result.row(best)]
    scales, counts = (
        [row[key] for row in rows] for key, rows in (("scale", sweep), ("NFE", steps))
    )
    return {
        "guidance-scale": _beside(
            Curve(
                f"plain CFG, scale {min(scales):g} to {max(scales):g}",
                sorted((row["effective scale"], row["score"].value) for row in sweep),
            ),
            result,
            "effective scale",
        ),
        "guidance-cost": _beside(
            Curve(
                f"plain {best}, {min(counts) / 2:g} to {max(counts) / 2:g} steps",
                sorted((row["NFE"], row["score"].value) for row in steps),
            ),
            result,
            "NFE",
        ),
    }


def _beside(plain: Curve, result: Result, key: str) -> Image.Image:
    """Every rule as a named point beside a curve of plain CFG."""
    rules = [row for row in result.rows if row["technique"]]
    curves = [plain]
    for scale in sorted({row["scale"] for row in rules}):
        group = [row for row in rules if row["scale"] == scale]
        curves.append(
            Curve(
                f"rules at scale {scale:g}",
                [(row[key], row["score"].value) for row in group],
                names=[row["method"].removesuffix(f" {scale:g}") for row in group],
                line=False,
            )
        )
    label = "effective scale" if key == "effective scale" else "NFE per image"
    return line_chart(
        curves,
        title=f"GenEval score against {label}",
        x_label=label,
        y_label="score",
        log="x" if key == "effective scale" else "",
        size=(1200, 900),
    )


def plot_adaptive(result: Result) -> dict[str, Image.Image]:
    """Score against cost: every threshold on the tuning prompts, the chosen one on the others."""
    curves = []
    for space in ("eps", "x0"):
        rows = [row for row in result.rows if row["set"] == "tuning" and row["space"] == space]
        points = sorted((row["NFE"], row["score"].value) for row in rows)
        curves.append(Curve(f"AG in {space}, tuning", points))
    for key in ("plain", "ours", "first"):
        row = result.row(result.facts[key], set="evidence")
        score = row["score"]
        curves.append(
            Curve(
                f"{row['method']}, evidence",
                [(row["NFE"], score.value)],
                low=[score.low],
                high=[score.high],
            )
        )
    chart = line_chart(
        curves, title="GenEval verdicts against cost", x_label="NFE per image", y_label="score"
    )
    return {"adaptive": chart}


def plot_dynamic(result: Result) -> dict[str, Image.Image]:
    """Weights that the latent evaluator chose, by step."""
    weights = result.facts["weights"]
    curves = [
        Curve(f"weight {weight}", list(enumerate(shares)))
        for weight, shares in weights["shares"].items()
    ]
    curves.append(Curve("mean weight", list(enumerate(weights["mean"])), right=True))
    chart = line_chart(
        curves,
        title=f"Weights chosen by the latent evaluator on emoji, {weights['images']} images",
        x_label="step (0 is the noisiest)",
        y_label="share of images",
        right_label="mean weight",
    )
    return {"dynamic": chart}


def negation_groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label -> the rows of one way to negate, for one kind of thing."""
    nag = [row for row in rows if row["method"].startswith("NAG")]
    plain = [row for row in rows if row["method"].startswith("CFG")]
    negative = [row for row in plain if "negative" in row["method"]]
    once = min(row["NFE"] for row in rows)
    groups = {
        f"NAG, {once:g} NFE": [row for row in nag if "every" not in row["method"]],
        "NAG at every step": [row for row in nag if "every" in row["method"]],
        f"negative prompt, {2 * once:g} NFE": [r for r in negative if "," not in r["method"]],
        f"negative prompt, {once:g} NFE": [row for row in negative if "," in row["method"]],
        f"CFG with NAG, {2 * once:g} NFE": [row for row in plain if "NAG" in row["method"]],
        "AdaptiveGuidance, negative prompt": [r for r in rows if r["method"].startswith("AG")],
        "CFG, nothing negated": [row for row in plain if len(row["method"].split()) == 2],
    }
    return {label: group for label, group in groups.items() if group}


def plot_negation(result: Result) -> dict[str, Image.Image]:
    """Share of images without what was negated, the rest kept, by effective strength: objects
    above, colours below."""
    pictures = []
    for kind, many in (("object", "objects"), ("colour", "colours")):
        curves = []
        rows = [row for row in result.rows if row["negated"] == kind]
        for label, group in negation_groups(rows).items():
            group = sorted(group, key=lambda row: row["effective strength"])
            shares = [row["gone and kept"] for row in group]
            curves.append(
                Curve(
                    label,
                    [(r["effective strength"], s.value) for r, s in zip(group, shares)],
                    low=[share.low for share in shares],
                    high=[share.high for share in shares],
                )
            )
        pictures.append(
            line_chart(
                curves,
                title=f"Negated {many}: share of images without it that keep the rest",
                x_label="effective strength of the negative text (1: none)",
                y_label="share, 95% interval",
                log="x",
            )
        )
    return {"negation": stacked(pictures)}


def digits(result: Result) -> str:
    facts, options = result.facts, result.options
    rows = [row for row in result.rows if row["budget"] == options["nfe"]]
    best = {
        group: min((row for row in rows if row["targets"] == group), key=lambda r: r["distance"])
        for group in dict.fromkeys(row["targets"] for row in rows)
    }
    nearest = "; ".join(
        f"{group}: {row['method']} ({row['distance']:.3f})" for group, row in best.items()
    )
    return page(
        result,
        f"Sampling digits by a classifier: {options['nfe']} NFE a class, {options['seeds']} seeds",
        f"Nearest to real held-out digits at {options['nfe']} NFE: {nearest}. Training digits are "
        f"at {facts['distance of training digits']:.3f}.",
        f"Both models were trained in {facts['training seconds']:.0f} processor seconds; the "
        f"classifier is right on {facts['accuracy']:.3f} of the held-out digits.",
        "![Fréchet distance against NFE](digits.png)",
        "![Draws of every method](digits-images.png)",
    )


def plot_digits(result: Result) -> dict[str, Image.Image]:
    """Fréchet distance against NFE, single digits and sets."""
    groups = list(dict.fromkeys(row["targets"] for row in result.rows))
    names = list(dict.fromkeys(row["method"] for row in result.rows))
    pictures = []
    for group in groups:
        curves = []
        for name in names:
            rows = [r for r in result.rows if (r["method"], r["targets"]) == (name, group)]
            errors = [2 * (row["distance error"] or 0.0) for row in rows]
            curves.append(
                Curve(
                    name,
                    [(row["NFE"], row["distance"]) for row in rows],
                    low=[
                        max(row["distance"] - e, row["distance"] / 10)
                        for row, e in zip(rows, errors)
                    ],
                    high=[row["distance"] + e for row, e in zip(rows, errors)],
                )
            )
        title = f"{group}: Fréchet distance to held-out digits, 2 standard errors"
        pictures.append(
            line_chart(curves, title=title, x_label="NFE", y_label="distance", log="xy")
        )
    return {"digits": stacked(pictures)}


PAGES: dict[str, Callable[[Result], str]] = {
    "guidance": guidance,
    "adaptive": adaptive,
    "dynamic": dynamic,
    "schedules": schedules,
    "geneval": geneval,
    "negation": negation,
    "pladis": pladis,
    "cost": cost,
    "nag_cost": nag_cost,
    "overhead": overhead,
    "pruning": pruning,
    "pruning_quality": pruning_quality,
    "pruning_caches": pruning_caches,
    "search": search,
    "guarantee": guarantee,
    "policy": policy,
    "noise_opt": noise_opt,
    "noise_opt_turbo": noise_opt,
    "video": video,
    "ratings": ratings,
    "found_prompts": found_prompts,
    "digits": digits,
    "kernels_cpu": kernels,
    "kernels_cuda": kernels,
    "gpu_cpu": gpu,
    "gpu_cuda": gpu,
}
PLOTS: dict[str, Callable[[Result], dict[str, Image.Image]]] = {
    "guidance": plot_guidance,
    "adaptive": plot_adaptive,
    "dynamic": plot_dynamic,
    "negation": plot_negation,
    "search": plot_search,
    "pruning_quality": plot_pruning_quality,
    "digits": plot_digits,
}


def stored(names: Sequence[str] = ()) -> list[tuple[Path, str]]:
    """Folder and name of every result, those of other models than the first in folders of their
    own; ``names``: these alone."""
    folders = [FOLDER, *sorted(path for path in FOLDER.iterdir() if path.is_dir())]
    return [
        (folder, name)
        for folder in folders
        for name in names or PAGES
        if (folder / f"{name}.json").exists()
    ]


def publish(name: str, folder: Path = FOLDER) -> str:
    """Write the page and the plots of a result beside its numbers; returns the page."""
    result = read(name, folder)
    text = PAGES[name](result)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    for plot, picture in PLOTS[name](result).items() if name in PLOTS else ():
        picture.save(folder / f"{plot}.png", optimize=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="results to write; all by default")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a page is not its numbers'"
    )
    options = parser.parse_args()
    for folder, name in stored(options.names):
        if not options.check:
            publish(name, folder)
        elif PAGES[name](read(name, folder)) != (folder / f"{name}.md").read_text("utf-8"):
            sys.exit(f"{name}.md is not what its numbers say; run python benchmarks/pages.py")


if __name__ == "__main__":
    main()
