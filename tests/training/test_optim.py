import pytest
import torch
from timm.scheduler import CosineLRScheduler

from lsag import LSAG, load_preset
from lsag.config import TrainConfig
from lsag.training.optim import lr_at, make_optimizer
from tests.conftest import ABLATIONS, small_config


def test_learning_rate_of_the_recipe():
    train, steps = load_preset("cifar-tiny").train, 67
    peak_lr = 5e-4 * 736 / 512

    def lr(step):
        return lr_at(step, train=train, steps_per_epoch=steps)

    assert lr(0) == pytest.approx(1e-6)
    assert lr(5 * steps) == pytest.approx(peak_lr)
    middle = 5 * steps + (295 * steps) // 2
    assert lr(middle) == pytest.approx((peak_lr + 1e-5) / 2, rel=1e-3)
    assert lr(300 * steps) == pytest.approx(1e-5)
    rates = [lr(step) for step in range(300 * steps)]
    peak = rates.index(max(rates))
    assert peak == 5 * steps
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_batch_scales_the_peak_or_all_rates():
    train = load_preset("cifar-base").train  # batches of 160
    assert train.learning_rates == pytest.approx((1e-6, 5e-4 * 160 / 512, 1e-5))
    every = TrainConfig(batch_size=160, lr_scaling="all")
    assert every.learning_rates == pytest.approx((1e-6 * 160 / 512, 5e-4 * 160 / 512, 1e-5 * 160 / 512))
    few = TrainConfig(batch_size=4)  # the rates never rise after the warm-up
    assert few.learning_rates == pytest.approx((1e-6, 5e-4 * 4 / 512, 5e-4 * 4 / 512))


@pytest.mark.parametrize("name", ["cifar-base-release", "in1k-small-release"])
def test_a_rate_for_each_epoch_is_deit_s(name):
    train, steps = load_preset(name).train, 7
    first, peak, last = train.learning_rates
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    theirs = CosineLRScheduler(optimizer, train.epochs, last, warmup_t=train.warmup_epochs, warmup_lr_init=first)
    for epoch in range(train.epochs):
        for step in (epoch * steps, epoch * steps + steps - 1):
            found = lr_at(step, train=train, steps_per_epoch=steps)
            assert found == pytest.approx(optimizer.param_groups[0]["lr"])
        theirs.step(epoch)  # DeiT steps after the epoch, with its number


def test_without_warm_up_the_cosine_starts_at_once():
    train = TrainConfig(epochs=1, batch_size=512, warmup_epochs=0)
    assert lr_at(0, train=train, steps_per_epoch=10) == pytest.approx(5e-4)


@pytest.mark.parametrize("changes", [{}, *ABLATIONS.values()], ids=["full", *ABLATIONS])
def test_only_matrices_and_kernels_are_decayed(changes):
    model = LSAG(small_config(**changes))
    optimizer = make_optimizer(model, load_preset("cifar-tiny").train)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, p in model.named_parameters() if p.dim() > 1 and "pos" not in name}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [("cifar-tiny", 6_595_584), ("cifar-tiny-release", 10_113_024), ("in1k-tiny-release", 9_877_632)],
)
def test_the_release_decays_positions_too(name, decayed):
    preset = load_preset(name)
    with torch.device("meta"):
        groups = make_optimizer(LSAG(preset.model), preset.train).param_groups
    assert sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"]) == decayed
