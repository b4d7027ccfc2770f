"""Do negative prompts work without guidance (NAG), what do they cost, and does sparse text
attention help (PLADIS)? On the embedded model; costs on the shapes of published ones.

    python benchmarks/attention.py [--only negation] [--runs-folder runs/attention]
    python benchmarks/attention.py --only cost [--quick] [--rounds 5]

Negation (negation.py): how often a negated object or colour is gone while the rest stays, by
emoji-judge, for nothing, CFG's negative prompt at several scales, NAG at CFG 1 and NAG under CFG,
each NAG beside CFG's negative prompt at the same effective strength. PLADIS: verdicts on the
evidence set beside a CFG sweep, whose images benchmarks/guidance.py shares. Cost (nag_cost.py):
operations and seconds of NAG beside a plain step, the floor and its authors' code.
"""

from __future__ import annotations

import nag_cost
import negation
import torch
from results import UNITS, Estimate, Row, images, model_options, on_model, quality, save
from rich.progress import Progress

import diffalign as da
from diffalign.embedded.load import reward_of
from diffalign.eval.evidence import Config, Measured, compare


def main() -> None:
    folders = {"runs_folder": "runs/attention", "evidence_folder": "runs/evidence"}
    parser = model_options(__doc__, **folders, threads=1, rounds=5)
    parser.add_argument("--only", choices=("negation", "cost", "pladis"))
    parser.add_argument("--quick", action="store_true", help="cost: time a few of the blocks")
    parser.add_argument("--few", action="store_true", help="the rows that matter alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only in (None, "cost"):
        nag_cost.study(options)
    if options.only == "cost":
        return
    pipe, judge = on_model(options)
    clip = da.rewards.load(reward_of(options.model))
    scale, default = options.scale, da.PLADIS().strength
    strengths = (0.0, default) if options.few else (0.0, 0.5, 1.0, 2.0)
    scales = (1.0, scale) if options.few else (1.0, scale, 2.0, 3.0)

    with Progress() as bar:
        if options.only != "pladis":
            negation.study(pipe, judge, options, bar)
        if options.only == "negation":
            return
        runs: dict[tuple[float, float], Measured] = {}
        for cfg in dict.fromkeys(scales):
            for strength in strengths if cfg in (1.0, scale) else (0.0,):
                name = f"CFG {cfg:g}" + (f" PLADIS {strength:g}" if strength else "")
                tools = (da.CFG(cfg), da.PLADIS(strength)) if strength else (da.CFG(cfg),)
                config = Config(name, tools, steps=options.steps)
                runs[cfg, strength] = images(
                    bar, pipe, judge, config, options.evidence_folder, clip=clip
                )
    plain = [run for (_, strength), run in runs.items() if not strength]
    best = max(plain, key=lambda run: run.score().mean)
    rows: list[Row] = [
        quality(run)
        | {
            "vs the same CFG": Estimate.of(compare(run, runs[cfg, 0.0])),
            "vs best": Estimate.of(compare(run, best)),
            "CLIP": run.mean("clip"),
        }
        | run.tags()
        for (cfg, _), run in runs.items()
    ]
    facts = {
        "best": best.config.name,
        "default": runs[scale, default].config.name,
        "strength": default,
        "prompts": 200,
        "seeds": 2,
    }
    differences = dict.fromkeys(("vs the same CFG", "vs best"), "difference of score")
    save("pladis", rows, options, UNITS | differences, facts)


if __name__ == "__main__":
    main()
