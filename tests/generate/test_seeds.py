"""The seed rule: numbers worked out by another program, and independence of everything else."""

from diffalign.core.seeds import seed_of
from diffalign.generate.seeds import jobs_of


def test_seeds_are_those_of_sha256sum():
    """`printf '7/a red apple/2' | sha256sum` begins with 6beac44d5368c7a5; one bit is dropped."""
    assert seed_of("a red apple", 2, base=7) == 0x6BEAC44D5368C7A5 >> 1


def test_seeds_differ_with_base_text_and_index_and_fit_a_generator():
    seeds = {seed_of(t, k, base) for t in ("a", "b", "é") for k in range(10) for base in (0, 1, 2)}
    assert len(seeds) == 90
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_image_keeps_its_seed_whatever_else_is_made():
    alone = jobs_of(["two cats"], count=2, base=5)
    among = jobs_of(["a dog", "two cats"], count=3, base=5)
    assert [job.seed for job in alone] == [job.seed for job in among[3:5]]


def test_a_prompt_that_stands_twice_goes_on_counting():
    twice, once = jobs_of(["a", "b", "a"], count=2), jobs_of(["a"], count=4)
    assert [job.seed for job in twice if job.prompt == "a"] == [job.seed for job in once]


def test_keys_are_unique_and_good_as_file_names():
    jobs = jobs_of(["A Bench, seen from above!", "é/é", "x" * 90, "a", "a"], count=2, base=3)
    assert jobs[1].key == "000-a-bench-seen-from-above-s3-1"
    assert len({job.key for job in jobs}) == len(jobs)
    assert all(job.key.replace("-", "").isalnum() and len(job.key) < 60 for job in jobs)
