"""NAG on every family against two models in lock-step, in float64, to 1e-12 of the prediction's
size."""

import fnmatch
import inspect

import pytest
import torch

import diffalign as da
from diffalign.families import FAMILIES, families
from diffalign.seams.attention.dense import Dense
from diffalign.testing.lockstep import paper, share_double_blocks, walk
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline, tiny_recipe

SCALE, TAU, ALPHA = 4.0, 1.6, 0.7  # values at which the clip acts on some tokens and not on others
BOUND = 1e-12

# one class of each family that takes a second text, and relatives with an attention of their own
PIPELINES = [
    *{f.name: f.pipelines[0] for f in reversed(families()) if f.second_text is not None}.values(),
    "PixArtSigmaPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
]
VARIANTS = [
    ("StableDiffusion3Pipeline", "3.5"),
    ("CogVideoXPipeline", "rotary"),
    ("WanPipeline", "2.2"),
    ("WanPipeline", "2.2-5b"),
]
CASES = [(name, "") for name in PIPELINES] + VARIANTS


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """Models that ask for float32 in places (Wan's residuals and norms) would round a difference of
    1e-16 to one of 1e-7."""
    narrow = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)
    )


def negative_names(name):
    """Call argument of the negative text -> denoiser argument, without the pooled text."""
    family = FAMILIES[name]
    arguments = {value for text in family.text for value in (text.name, text.mask)}
    return {
        f"negative_{key}": value
        for key, value in family.encoder.arguments.items()
        if value in arguments
    }


def negative_arguments(name, inputs, kwargs):
    """The denoiser's arguments with the negative text in place of the prompt."""
    changed = dict(kwargs)
    for given, argument in negative_names(name).items():
        value = inputs[given]
        like = kwargs[argument]
        changed[argument] = list(value) if isinstance(value, list) else value.to(like.dtype)
    if name == "ChromaPipeline":  # its mask covers the image tokens too
        tokens = kwargs["attention_mask"].shape[1] - kwargs["encoder_hidden_states"].shape[1]
        changed["attention_mask"] = torch.cat(
            [changed["attention_mask"], kwargs["attention_mask"][:, -tokens:]], 1
        )
    if kwargs.get("txt_ids") is not None:
        changed["txt_ids"] = torch.zeros(
            changed["encoder_hidden_states"].shape[1], 3, dtype=kwargs["txt_ids"].dtype
        )
    return changed


def rows(value, picked, total, axis=0):
    if isinstance(value, torch.Tensor) and axis:
        return value.movedim(axis, 0)[picked].movedim(0, axis)
    if isinstance(value, torch.Tensor):
        return value[picked] if value.ndim and value.shape[0] == total else value
    if isinstance(value, dict):
        return {key: rows(item, picked, total, axis) for key, item in value.items()}
    listed = isinstance(value, list) and isinstance(value[0], torch.Tensor)
    return value[picked] if listed and len(value) == total else value


def denoisers(pipe, name):
    return [
        part for key in FAMILIES[name].denoisers if (part := getattr(pipe, key, None)) is not None
    ]


def calls(pipe, name, inputs):
    """Outputs of the denoiser, one entry per call."""
    seen = []

    def record(module, given, output):
        value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if value is not None:  # a call that only reads a finished chunk predicts nothing
            seen.append(torch.stack(value) if isinstance(value, list) else value.clone())

    handles = [part.register_forward_hook(record) for part in denoisers(pipe, name)]
    pipe(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def reference(pipe, name, inputs, guided, formula, batch, negative=None, more=None):
    """The pipeline with each conditional evaluation replaced by the walk in lock-step."""
    family, met, turn = FAMILIES[name], [], []

    def replace(module):
        original = module.forward
        parameters = list(inspect.signature(original).parameters)

        def forward(*args, **kwargs):
            kwargs = {**dict(zip(parameters, args)), **kwargs}
            if family.remembers is not None and family.remembers(kwargs):
                return original(**kwargs)
            hidden = next(iter(kwargs.values()))
            total = len(hidden)
            turn.append(1)
            plain = dict(kwargs)
            if guided and family.mode == "sequential" and len(turn) % 2 == 0:
                return original(**plain)
            if guided and family.mode == "batched":
                first, second = slice(0, batch), slice(batch, total)
                cond, uncond = (first, second) if family.order == "cu" else (second, first)
                axes = family.row_axes
                one, other = (
                    {key: rows(v, part, total, axes.get(key, 0)) for key, v in kwargs.items()}
                    for part in (cond, uncond)
                )
                other = original(**other)
                other = other[0] if isinstance(other, tuple) else other.sample
            else:
                one, other = kwargs, None
            with_forward = module.__dict__.pop("forward")
            away = {
                **negative_arguments(name, negative or inputs, one),
                **(
                    {}
                    if more is None
                    else {"pooled_projections": inputs["negative_pooled_prompt_embeds"]}
                ),
            }
            prediction, layers = walk(module, tiny_recipe(name).hooks, one, away, formula, more)
            module.forward = with_forward
            met.append(layers)
            if other is not None:
                pair = (prediction, other) if family.order == "cu" else (other, prediction)
                prediction = (
                    [*pair[0], *pair[1]] if isinstance(prediction, list) else torch.cat(pair)
                )
            memory = () if family.remembers is None else (kwargs["kv_cache"],)
            return (prediction, *memory)

        module.forward = forward

    for part in denoisers(pipe, name):
        replace(part)
    try:
        return calls(pipe, name, inputs), met
    finally:
        for part in denoisers(pipe, name):
            part.__dict__.pop("forward", None)


def make(name, variant, guided, batch=2, steps=2):
    return tiny_inputs(
        name, variant=variant, batch=batch, steps=steps, guided=guided, dtype=torch.float64
    )


def compare(name, variant, guided, nag, formula, batch=2, negative=None, more=None):
    """Run ours and the reference; every prediction must agree. ``negative``: its text, when it is
    not the call's."""
    pipe = tiny_pipeline(name, variant=variant, dtype=torch.float64)
    for part in denoisers(pipe, name):
        torch.nn.Module.to(part, torch.float64)  # parts that a class keeps in float32 as well
    inputs = make(name, variant, True, batch)
    dropped = {key: inputs[key] for key in FAMILIES[name].only_guided}
    expected, met = reference(
        pipe,
        name,
        make(name, variant, guided, batch),
        guided,
        formula,
        batch,
        negative or dropped,
        more,
    )
    plain = calls(pipe, name, make(name, variant, guided, batch))
    with da.apply(pipe, nag) as session:
        got = calls(pipe, name, make(name, variant, guided, batch) | dropped)
    assert len(got) == len(expected) == len(plain)
    for a, b in zip(got, expected):
        assert torch.isfinite(b).all()
        assert (a[: len(b)] - b).abs().max() <= BOUND * b.abs().max()
    assert (expected[0] - plain[0]).abs().max() > 1e-3 * plain[0].abs().max()
    return session.report(), met


def ours(**options):
    return da.NAG(SCALE, tau=TAU, alpha=ALPHA, **{"sigma": (0.0, float("inf")), **options})


def theirs(positive, negative, layer):
    return paper(positive, negative, SCALE - 1, TAU, ALPHA)


@pytest.mark.parametrize("guided", [False, True], ids=["alone", "with CFG"])
@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.few(16)
def test_two_models_in_lock_step(name, variant, guided):
    report, met = compare(name, variant, guided, ours(), theirs, batch=1 if "VACE" in name else 2)
    layers = met[0] * (2 if variant == "2.2" else 1)
    assert report.layers["NAG"] == (layers, layers)
    model = denoisers(tiny_pipeline(name, variant=variant), name)[0]
    two_rows = FAMILIES[name].second_text.in_rows(model)
    # what reads finished chunks: one row of each branch between the chunks of two steps each
    readings = report.steps // 2 - 1 if FAMILIES[name].remembers is not None else 0
    assert report.nfe == report.steps * (1 + guided + two_rows) + readings * (1 + guided)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "PixArtAlphaPipeline",
        "SanaPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "QwenImagePipeline",
        "Lumina2Pipeline",
        "ZImagePipeline",
    ],
)
@pytest.mark.parametrize("length", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_texts_of_unequal_length(name, length):
    """A negative text of its own, shorter and longer than the prompt, beside the negative prompt of
    CFG."""
    given = tiny_inputs(name, batch=2, dtype=torch.float64)
    text = given["prompt_embeds"]
    rng = torch.Generator().manual_seed(7)
    width = text[0].shape[-1]
    negative = {key: value for key, value in given.items() if key.startswith("negative_")}
    if isinstance(text, list):
        negative["negative_prompt_embeds"] = [
            torch.randn(length, width, generator=rng, dtype=torch.float64) for _ in text
        ]
    else:
        negative["negative_prompt_embeds"] = torch.randn(
            2, length, width, generator=rng, dtype=torch.float64
        )
        for key in negative:
            if "mask" in key:
                mask = torch.ones(2, length, dtype=negative[key].dtype)
                mask[1, -1:] = 0  # one row shorter than the other
                negative[key] = mask
    named = {key: value for key, value in negative.items() if key in negative_names(name)}
    report, _ = compare(name, "", True, ours(negative_embeds=named), theirs, negative=negative)
    assert "NAG: negative text from NAG(negative_embeds=...)" in report.notes


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Lumina2Pipeline"],
)
def test_layers_left_out_keep_the_texts_apart(name):
    """Where NAG does not act, the negative text still must not reach the image; its own tokens go
    on."""
    pattern = {"StableDiffusionPipeline": "up_blocks.*", "Lumina2Pipeline": "layers.1.*"}.get(
        name, "transformer_blocks.0.*"
    )
    if name == "FluxPipeline":
        pattern = "single_*"

    def formula(positive, negative, layer):
        return theirs(positive, negative, layer) if fnmatch.fnmatch(layer, pattern) else positive

    report, met = compare(name, "", False, ours(layers=(pattern,)), formula)
    acting, selected = report.layers["NAG"]
    assert 0 < acting == selected < met[0]


def test_two_norm_of_the_authors_flux_code():
    compare(
        "FluxPipeline",
        "",
        False,
        ours(norm="l2"),
        lambda a, b, layer: paper(a, b, SCALE - 1, TAU, ALPHA, order=2),
    )


@pytest.mark.parametrize("guided", [False, True])
def test_published_flux_layout(guided):
    """A second image stream in the single blocks, modulated with the negative pooled text."""
    report, _ = compare(
        "FluxPipeline", "", guided, ours(share_image=False), theirs, more=share_double_blocks
    )
    assert report.nfe == report.steps * (2 + guided)
    assert any("share_image=False" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("FluxPipeline", {}, None),
        ("FluxPipeline", {"share_image": False}, share_double_blocks),
        ("StableDiffusion3Pipeline", {}, None),
    ],
)
def test_where_no_log_sum_exp_is_told(monkeypatch, name, options, more):
    """As on other backends than torch's own, and under gradients: two whole attentions."""
    monkeypatch.setattr(Dense, "part", lambda *_: None)
    compare(name, "", True, ours(**options), theirs, more=more)
