"""A global batch of 16 pairs gives the same draws, loss and gradient however it is dealt out to ranks and micro-steps.

Every split takes the weights of the 16 x 1 run before each update, so that what is compared is one update's rounding
and not what an optimizer makes of it later.
"""

import pytest
import torch
from recording import record, record_on_ranks, train_flags

STEPS, PAIRS = 3, 16  # 40 pairs: the second epoch begins within the third update
PER_PAIR = {"use_winner_preserving": True, "winner_preserving_mu": 0.5, "winner_preserving_per": "pair"}
CASES = {
    "sd15-dpo": {"train_method": "diffusion-dpo", **PER_PAIR},
    "sd15-dspo": {"train_method": "dspo", **PER_PAIR},
    "sd15-dmpo-plain": {"train_method": "dmpo"},
    "sd15-sft": {"train_method": "sft"},
    "sdxl-dpo-plain": {"train_method": "diffusion-dpo"},
    "sdxl-dspo": {"train_method": "dspo", **PER_PAIR},
    "sdxl-dmpo": {"train_method": "dmpo", **PER_PAIR},
}
ON_TWO_RANKS = [(case, 8) for case in CASES] + [("sd15-dmpo-plain", 4), ("sdxl-dmpo", 4)]

# Relative differences in units of fp32's 2^-23 that sums in another order may make; measured over all cases and splits
# at beta 10, where a margin adds little to them: losses at most 3, gradients at most 34
LIMITS = {"loss": 16 * 2**-23, "gradient": 256 * 2**-23}


def command(case, batch, base, data, output, **changes):
    common = {
        "max_train_steps": STEPS,
        "random_crop": True,
        "input_perturbation": 0.1,
        "max_grad_norm": 0,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-4,
    }
    split = {"train_batch_size": batch, "global_batch_size": PAIRS}
    settings = common | split | {"sdxl": case.startswith("sdxl")} | CASES[case] | changes
    return train_flags(base, data, output, **settings)


def joined(ranks):
    """Updates as one device with one micro-step would have recorded them."""
    for updates in zip(*ranks, strict=True):
        draws = [micro for together in zip(*(update["draws"] for update in updates), strict=True) for micro in together]
        losses = [loss for update in updates for loss in update["losses"]]
        assert all(torch.equal(update["gradient"], updates[0]["gradient"]) for update in updates)
        yield {
            "captions": [caption for micro in draws for caption in micro["captions"]],
            "draws": {name: torch.cat([micro[name] for micro in draws]) for name in draws[0] if name != "captions"},
            "loss": torch.tensor(sum(losses) / len(losses)),
            "gradient": updates[0]["gradient"],
            "exchanges": updates[0]["exchanges"],
        }


def difference(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def run(bases, wide_pairs, tmp_path_factory):
    """Updates of a case on one rank, in micro-steps of `batch` pairs; those of 16 are made once and teach the others."""
    made = {}

    def build(case, batch, **changes):
        folder = tmp_path_factory.mktemp("split")
        given = command(case, batch, bases[case[:4], "epsilon"], wide_pairs, folder, **changes)
        if batch < PAIRS:
            return list(joined([record(given, made[case][0])]))
        if case not in made:
            made[case] = folder, list(joined([record([*given, "--checkpointing_steps=1"])]))
        return made[case][1]

    build.folder = lambda case: made[case][0]
    return build


@pytest.fixture(scope="module")
def on_two_ranks(run, bases, wide_pairs, tmp_path_factory):
    """Updates by (case, pairs per rank and micro-step) on two ranks."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), {}
    for case, batch in ON_TWO_RANKS:
        run(case, PAIRS)
        given = command(case, batch, bases[case[:4], "epsilon"], wide_pairs, folder / f"{case}-{batch}")
        jobs[case, batch] = given, run.folder(case)
    return dict(zip(jobs, map(list, map(joined, record_on_ranks(2, jobs.values(), folder))), strict=True))


def assert_same_updates(got, expected):
    assert len(got) == len(expected) == STEPS
    for update, wanted in zip(got, expected, strict=True):
        assert update["captions"] == wanted["captions"]
        assert update["draws"].keys() == wanted["draws"].keys()
        for name, values in wanted["draws"].items():
            assert torch.equal(update["draws"][name], values), name
        for name, limit in LIMITS.items():
            assert difference(update[name], wanted[name]) <= limit, name


@pytest.mark.parametrize("batch", (8, 1))
@pytest.mark.parametrize("case", CASES)
def test_micro_steps_do_not_change_an_update(run, case, batch):
    whole = run(case, PAIRS)
    assert_same_updates(run(case, batch), whole)


@pytest.mark.parametrize("case, batch", ON_TWO_RANKS)
def test_ranks_do_not_change_an_update(run, on_two_ranks, case, batch):
    assert_same_updates(on_two_ranks[case, batch], run(case, PAIRS))


@pytest.mark.parametrize("case, batch", ON_TWO_RANKS)
def test_ranks_exchange_gradients_once_per_update(on_two_ranks, case, batch):
    micro_steps = PAIRS // (2 * batch)
    for update in on_two_ranks[case, batch]:
        assert update["exchanges"] == [False] * (micro_steps - 1) + [True]


def test_what_is_compared_is_drawn_for_every_pair(run):
    """Were flips, crops or captions constant, or pairs repeated, equality would show little."""
    updates = run("sd15-dpo", PAIRS)
    for name in ("pixels", "noise", "posterior_noise", "uniform", "timesteps"):
        values = torch.cat([update["draws"][name] for update in updates]).reshape(STEPS * PAIRS, -1)
        assert len(values.unique(dim=0)) > 0.9 * STEPS * PAIRS
    captions = [caption for update in updates for caption in update["captions"]]
    assert 0 < captions.count("") < PAIRS
    assert len(set(captions)) > STEPS * PAIRS // 2


@pytest.mark.parametrize("case", ("sd15-dmpo-plain", "sdxl-dpo-plain"))
def test_the_official_scale_per_micro_batch_depends_on_the_split(run, case):
    """Same draws and same loss, for the scale only acts backward, but another gradient."""
    run(case, PAIRS)  # makes the weights that both start every update from
    updates = [run(case, batch, **PER_PAIR | {"winner_preserving_per": "batch"}) for batch in (8, 4)]
    for coarse, fine in zip(*updates, strict=True):
        assert torch.equal(coarse["draws"]["pixels"], fine["draws"]["pixels"])
        assert difference(coarse["loss"], fine["loss"]) <= LIMITS["loss"]
    assert difference(coarse["gradient"], fine["gradient"]) > 10 * LIMITS["gradient"]
