"""Rewriters: rules, and a local language model with strict reading of its answers."""

import pytest
import torch

from diffalign.search.rewriters import LanguageModel, Rewriter, Rules, answers
from diffalign.search.wording import loss

PROMPT = "a photo of a red apple and a green clock"


def test_rules_write_new_wordings_of_the_best_in_turn():
    best = [(PROMPT + ", centered", 0.4), (PROMPT, 0.3)]
    worst = [(PROMPT + ", detailed", 0.1)]
    texts = Rules()(PROMPT, best, worst, 12)
    assert len(texts) == len(set(texts)) == 12
    assert not {text for text, _ in best + worst} & set(texts)
    assert sum("centered" in text for text in texts) >= 5
    assert isinstance(Rules(), Rewriter)


def test_equal_questions_have_equal_answers_and_feedback_changes_them():
    best = [(PROMPT, 0.3)]
    assert Rules()(PROMPT, best, [], 5) == Rules()(PROMPT, best, [], 5)
    other = Rules()(PROMPT, best, [(PROMPT + ", detailed", 0.1)], 5)
    assert other != Rules()(PROMPT, best, [], 5)
    # more of them begin with the same ones
    assert Rules()(PROMPT, best, [], 9)[:5] == Rules()(PROMPT, best, [], 5)


def test_rules_draw_from_no_global_generator():
    import random

    before = random.getstate()
    Rules()(PROMPT, [(PROMPT, 0.0)], [], 5)
    assert random.getstate() == before


def test_only_entries_of_a_list_are_answers():
    text = """1. a red apple beside a green clock
Sure, here are some prompts:
2) "an apple that is red and a clock that is green"
3.
- a green clock and a red apple
1. a red apple beside a green clock
some closing words"""
    assert answers(text) == [
        "a red apple beside a green clock",
        "an apple that is red and a clock that is green",
        "a green clock and a red apple",
    ]
    assert answers("x" * 400) == answers("1. " + "x" * 400) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of random weights that knows a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = [
        "<end>",
        *["a", "red", "apple", "and", "green", "clock", "photo", "of", "1", "2", ".", "better"],
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>", pad_token="<end>"
    )
    size = {"n_positions": 512, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = GPT2Config(vocab_size=len(words), bos_token_id=0, eos_token_id=0, **size)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    place = tmp_path_factory.mktemp("model")
    fast.save_pretrained(place)
    model.save_pretrained(place)
    return str(place)


def test_a_local_language_model_answers_again_the_same(folder):
    model = LanguageModel(folder)
    before = torch.get_rng_state()
    first = model(PROMPT, [(PROMPT, 0.2)], [], 3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == LanguageModel(folder)(PROMPT, [(PROMPT, 0.2)], [], 3)
    assert 1 <= len(first) <= 3
    # babble of random weights: nothing of it states what the prompt states
    assert all(loss(PROMPT, text) for text in first)


def test_what_the_model_is_told():
    questions = []

    class Fake(LanguageModel):
        def generate(self, question, tokens):
            questions.append((question, tokens))
            return " a green clock and a red apple\n2. nonsense"

    model = Fake("none", tokens=10)
    answer = model(PROMPT, [("good one", 0.75)], [("bad one", 0.25)], 2)
    assert answer == ["a green clock and a red apple", "nonsense"]
    ((question, tokens),) = questions
    assert tokens == 20
    for part in (PROMPT, "0.750: good one", "0.250: bad one", "Write 2 new prompts"):
        assert part in question


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="must be 'rules', or a local text-generation model"):
        LanguageModel(str(tmp_path / "none"))(PROMPT, [], [], 1)
