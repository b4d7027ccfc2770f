"""What a reader can do with a result, in sentences made of its numbers alone."""

from __future__ import annotations

from results import Estimate, Result, Row

# the largest loss of score that counts as none
TOLERANCE = 0.02
# share of the evaluations that AdaptiveGuidance must save
SAVING = 0.25


def guidance(row: Row, result: Result) -> str:
    """Whether a rule is of use on a model like this one."""
    best: Estimate = row["vs best"]
    same: Estimate = row["vs CFG at its scale"]
    saved = 1.0 - row["NFE"] / result.row(result.facts["best"])["NFE"]
    second: Estimate = row["second judge vs best"]
    if best.low > 0.0 and second.low > 0.0:
        return f"Use it: {best.value:+.3f} over the best plain scale."
    if best.low > 0.0:
        return (
            f"Try it: {best.value:+.3f} over the best plain scale, of which the second judge does "
            f"not see all ({second:+.3f})."
        )
    if same.low > 0.0:
        return (
            f"Use it where the scale may be too strong: {same.value:+.3f} over plain guidance at "
            f"the same scale, {best.value:+.3f} against the best plain scale."
        )
    if saved >= 0.1 and best.low > -TOLERANCE:
        return (
            f"Use it to save {100 * saved:.0f}% of the evaluations; a loss above {TOLERANCE:g} is "
            "excluded at 95%."
        )
    if best.high < 0.0:
        return f"Leave it off: {best.value:+.3f} against the best plain scale."
    if saved >= 0.1:
        return (
            f"It saves {100 * saved:.0f}%, and may cost up to {-best.low:.3f}: look at your own "
            "prompts first."
        )
    more = f"; it costs {-100 * saved:.0f}% more." if saved < -0.1 else "."
    return f"No difference from the best plain scale was shown{more}"


def adaptive(result: Result) -> str:
    """What AdaptiveGuidance saves, and whether the loss stays within the tolerance."""
    facts = result.facts
    ours, plain, first = (
        result.row(facts[key], set="evidence") for key in ("ours", "plain", "first")
    )
    saved = 1.0 - ours["NFE"] / plain["NFE"]
    holds = saved >= SAVING and ours["vs CFG"].low > -TOLERANCE
    share = 100 * (first["NFE"] / result.options["steps"] - 1.0)
    return (
        f"AdaptiveGuidance(threshold={facts['threshold']:g}, space={facts['space']!r}): "
        f"{100 * saved:.0f}% fewer NFE, difference to CFG {ours['vs CFG']:+.3f}; to CFG for the "
        f"first {share:g}% of the steps {facts['ours vs first']:+.3f}; bar "
        f"{'held' if holds else 'missed'}"
    )


def dynamic(result: Result) -> str:
    """What a weight chosen per image and step gains over the best fixed one and over its own mean,
    and what it costs in time."""
    facts = result.facts
    parts = []
    for kind, method in facts["evaluators"].items():
        row = result.row(method, set="evidence")
        ratio = row["processor time / CFG"]
        part = f"{kind} {row['vs CFG']:+.3f} at {ratio:.2f} times the processor time"
        mean = f"CFG {row['mean weight']:.2f}, the mean of its choices"
        part += f", {row['vs its mean']:+.3f} to {mean}"
        parts.append(part)
    return (
        f"candidates {tuple(facts['candidates'])} from progress {facts['start']:g} on, chosen on "
        f"the tuning prompts. On the evidence set, against {facts['plain']}, by evaluator: "
        f"{'; '.join(parts)}"
    )


def schedules(result: Result) -> str:
    """Whether the chosen shape beats a constant weight, on prompts that had no part in the
    choice."""
    facts = result.facts
    row = result.row_where(set="evidence", shape=facts["shape"])
    gain: Estimate = row["vs best constant"]
    verdict = "above" if gain.low > 0.0 else "below" if gain.high < 0.0 else "not to be told from"
    whence = (
        f"the shape that {result.options['tuned']} chose"
        if result.options["tuned"]
        else "the best shape on the tuning prompts"
    )
    return (
        f"{facts['shape']}, {whence}, is {verdict} the best constant weight, "
        f"{facts['constant']:g}, on the evidence set: {gain:+.3f}; {row['vs constant']:+.3f} to "
        f"the constant weight of its own scale, {facts['scale']:g}."
    )


def negation(result: Result) -> str:
    """A sentence for objects and one for colours, about NAG's best way for each."""
    sentences = []
    for kind, what in (
        ("object", "Removes a negated object and keeps the other"),
        ("colour", "A negated colour"),
    ):
        rows = [row for row in result.rows if row["negated"] == kind]
        ours = _best([row for row in rows if row["method"].startswith("NAG")])
        equal = at_equal_strength(result, ours)
        plain = [row for row in rows if row["method"].startswith("CFG")]
        best = _best([row for row in plain if "negative" in row["method"]])
        shares = [
            f"{100 * row['gone and kept'].value:.0f}%" for row in (rows[0], ours, equal, best)
        ]
        sentences.append(
            f"{what} in {shares[1]} at {ours['NFE']:.0f} NFE without guidance ({ours['method']}; "
            f"nothing: {shares[0]}); CFG's negative prompt: {shares[2]} at equal strength, "
            f"{shares[3]} at most ({best['method'].removesuffix(' negative')}), both at "
            f"{best['NFE']:.0f} NFE."
        )
        for kept in [row for row in rows if row["method"].startswith("AG")]:
            full = result.row(kept["method"].replace("AG", "CFG"), negated=kind)
            sentences.append(
                f"AdaptiveGuidance keeps {100 * kept['gone and kept'].value:.0f}% at "
                f"{kept['NFE']:.0f} NFE of {100 * full['gone and kept'].value:.0f}% at "
                f"{full['NFE']:.0f} ({full['method'].removesuffix(' negative')})."
            )
    return " ".join(sentences)


def at_equal_strength(result: Result, ours: Row) -> Row:
    """CFG's negative prompt at the effective strength of a row of NAG."""
    method = ours["CFG's negative prompt at equal strength"]
    return result.row(method, negated=ours["negated"])


def _best(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row["gone and kept"].value)


def pladis(result: Result) -> str:
    """Whether PLADIS with its default strength is of use beside guidance."""
    facts = result.facts
    gain: Estimate = result.row(facts["default"])["vs the same CFG"]
    verdict = (
        "Use it" if gain.low > 0.0 else "Leave it off" if gain.high < 0.0 else "No difference shown"
    )
    return (
        f"{verdict} against the same CFG without it (strength {facts['strength']:g}, the default)."
    )


def pruning(result: Result) -> str:
    """Whether CAT is worth its time beside fewer steps, and whether its choice of tokens is."""
    sentences = []
    for steps in dict.fromkeys(row["steps"] for row in result.rows):
        rows = [result.row(name, steps=steps) for name in ("CAT 0.3", "round-robin 0.3")]
        parts = []
        for row in rows:
            near: Estimate = row["PSNR vs fewer steps"]
            right: Estimate = row["judge vs fewer steps"]
            word = "nearer to" if near.low > 0.0 else "not nearer to"
            word = "farther from" if near.high < 0.0 else word
            parts.append(
                f"{row['method']} is {word} the full run ({near:+.1f} dB), right images "
                f"{right:+.2f}"
            )
        sentences.append(f"Beside fewer of {steps} steps in equal seconds: {'; '.join(parts)}.")
    return " ".join(sentences)


def bar_held(row: Row) -> str:
    """Whether a technique stays within its bar for time."""
    return "–" if row["bar"] is None else "yes" if row["ratio"] <= row["bar"] else "no"
