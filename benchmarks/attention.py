"""Do negative prompts work without guidance (NAG), and does sparse text attention help (PLADIS)? On
the embedded model.

    python benchmarks/attention.py [--only negation] [--runs-folder runs/attention]

Negation (negation.py): how often a negated object or colour is gone while the rest stays, by
emoji-judge, for nothing, CFG's negative prompt at several scales, NAG at CFG 1 and NAG under CFG,
each NAG beside CFG's negative prompt at the same effective strength. PLADIS: verdicts on the
evidence set beside a CFG sweep, whose images benchmarks/guidance.py shares.
"""

from __future__ import annotations

import argparse
from typing import Any

import negation
import torch
from results import images, write
from rich.progress import Progress

import diffalign as da
from diffalign.embedded import load
from diffalign.eval.evidence import Config, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("negation", "pladis"))
    parser.add_argument("--runs-folder", default="runs/attention")
    parser.add_argument("--evidence-folder", default="runs/evidence")
    parser.add_argument("--output", default="benchmarks/results")
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, judge, clip, scale = (
        load("emoji"),
        load("emoji-judge"),
        da.rewards.load("emoji-clip"),
        options.scale,
    )

    with Progress() as bar:
        if options.only != "pladis":
            negation.study(pipe, judge, options, bar)
        if options.only == "negation":
            return
        done: dict[tuple[float, float], Any] = {}
        for cfg, strengths in (
            (1.0, (0.0, 0.5, 1.0, 2.0)),
            (scale, (0.0, 0.5, 1.0, 2.0)),
            (2.0, (0.0,)),
            (3.0, (0.0,)),
        ):
            for strength in strengths:
                name = f"CFG {cfg:g}" + (f" PLADIS {strength:g}" if strength else "")
                tools = (da.CFG(cfg), da.PLADIS(strength)) if strength else (da.CFG(cfg),)
                done[cfg, strength] = images(
                    bar,
                    pipe,
                    judge,
                    Config(name, tools, steps=options.steps),
                    options.evidence_folder,
                    clip=clip,
                )
    best = max(
        (m for (_, strength), m in done.items() if not strength), key=lambda m: m.score().mean
    )
    table = [
        {
            "method": m.config.name,
            "NFE": m.mean("nfe"),
            "seconds": m.mean("seconds"),
            "score": m.score().mean,
        }
        | {
            "95%": f"{m.score().low:.3f}-{m.score().high:.3f}",
            "vs the same CFG": str(compare(m, done[cfg, 0.0])),
        }
        | {
            f"vs best of the sweep ({best.config.name})": str(compare(m, best)),
            "CLIP": m.mean("clip"),
        }
        | m.tags()
        for (cfg, _), m in done.items()
    ]
    for row, ((cfg, strength), m) in zip(table, done.items(), strict=True):
        if (cfg, strength) == (scale, da.PLADIS().strength):
            gain = compare(m, done[cfg, 0.0])
            said = (
                "Use it"
                if gain.low > 0.0
                else "Leave it off"
                if gain.high < 0.0
                else "No difference shown"
            )
            row |= {
                "technique": "pladis",
                "advice": f"{said} against the same CFG without it (strength {strength:g}, the default).",
            }
    write("pladis", table, options, title="PLADIS on emoji: 200 GenEval prompts x 2 seeds")


if __name__ == "__main__":
    main()
