import errno
import multiprocessing
import os
import random
import signal
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from lsag import load_preset
from lsag.data.loading import EpochBatches, TrainSet, batches, eval_loader, random_key, train_loader
from lsag.data.splits import open_split
from lsag.data.transforms import Normalize, eval_transform, train_transform
from lsag.errors import InputError, UsageError, WorkerError


def test_broken_images_end_an_epoch_with_their_name(folder):
    (folder / "train/dog/2.png").write_bytes(b"broken")
    preset = load_preset("cifar-nano", {"train.batch_size": 4}, dataset="folder")
    source = open_split("folder", folder, train=True, mode="RGB")
    for workers in (0, 1):
        loader = train_loader(source, preset, EpochBatches(len(source), preset), workers=workers)
        with pytest.raises(InputError, match=r"cannot read image .*dog/2\.png: not an image"):
            list(batches(loader))
        del loader
        assert not multiprocessing.active_children(), "something still holds the loader"


def test_broken_images_are_replaced_alike_by_any_process(folder):
    preset = load_preset("cifar-nano", {"train.batch_size": 4}, dataset="folder")
    source = open_split("folder", folder, train=True, mode="RGB")
    for name in ("cat/1.png", "dog/2.png"):
        (folder / "train" / name).write_bytes(b"broken")

    def epoch(workers):
        loader = train_loader(source, preset, EpochBatches(len(source), preset), workers=workers, skip_broken=True)
        return list(batches(loader)), loader.dataset.broken.tolist()

    (first, broken), (second, broken_too) = epoch(0), epoch(2)
    assert broken == broken_too == [0, 1, 0, 0, 0, 0, 1, 0]
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for path in folder.glob("train/*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="no training image could be read in 100 attempts"):
        epoch(0)


def test_a_worker_that_died_between_two_epochs_is_named(tmp_path):
    """torch waits for an answer of each worker before an epoch begins, too."""
    preset = load_preset("digits-nano")
    source = open_split("digits", tmp_path, train=True, mode="L")
    order = EpochBatches(len(source), preset)
    loader = train_loader(source, preset, order, workers=2)
    others = set(multiprocessing.active_children())
    assert len(list(batches(loader))) == len(order)
    worker = (set(multiprocessing.active_children()) - others).pop()
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(WorkerError, match="killed by signal"):
        list(batches(loader))


def test_what_keeps_workers_from_passing_on_a_batch_is_named(tmp_path, monkeypatch):
    """At once: torch shows the traceback of a worker's thread, and waits for a batch that never comes."""
    import lsag.data.loading

    preset = load_preset("digits-nano")
    source = open_split("digits", tmp_path, train=True, mode="L")
    main = os.getpid()

    def full(tensor):
        if os.getpid() != main:
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )

    def refused(fix):
        with pytest.raises(WorkerError, match=f"cannot pass them on: .* — .*{fix}, or use --workers 0"):
            list(batches(train_loader(source, preset, EpochBatches(len(source), preset), workers=1)))

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "share_memory_", full)
        refused(r"/dev/shm \(docker run --shm-size=1g\)")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
        patch.setattr(multiprocessing.process.current_process(), "_config", {})  # which keeps the folder in use
        (tmp_path / ("x" * 120)).mkdir()
        refused("set TMPDIR to a folder with a shorter name")

    def no_more_files(family):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(lsag.data.loading, "Listener", no_more_files)
    refused("ulimit -n")


def test_signals_leave_workers_at_work_but_not_for_ever(tmp_path, monkeypatch):
    import lsag.data.loading

    monkeypatch.setattr(lsag.data.loading, "WORKER_GRACE", 3)
    preset = load_preset("digits-nano")
    source = open_split("digits", tmp_path, train=True, mode="L")
    order = EpochBatches(len(source), preset)
    loader = train_loader(source, preset, order, workers=1)
    loading = batches(loader)
    next(loading)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(loading)) == len(order) - 1
    worker.join(10)
    assert worker.exitcode == -signal.SIGALRM


def test_what_is_random_depends_on_seed_epoch_and_image_alone(folder):
    preset = load_preset("cifar-tiny", {"train.batch_size": 4, "model.image_size": 8}, dataset="folder")
    source = open_split("folder", folder, train=True, mode="RGB")

    def epoch(number, workers, preset=preset):
        order = EpochBatches(len(source), preset)
        order.epoch = number
        random.seed(number + workers)
        return [
            (images.clone(), labels) for images, labels in batches(train_loader(source, preset, order, workers=workers))
        ]

    def same(a, b):
        return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))

    first = epoch(0, 0)
    assert same(first, epoch(0, 0)) and same(first, epoch(0, 1)) and same(first, epoch(0, 2))
    assert not same(first, epoch(1, 0))
    other_seed = preset.model_copy(update={"train": preset.train.model_copy(update={"seed": 1})})
    assert not same(first, epoch(0, 0, other_seed))


def test_epochs_visit_each_image_once():
    preset = load_preset("cifar-nano", {"train.batch_size": 10})
    order = EpochBatches(105, preset)
    visited = [index for batch in order for epoch, index in batch]
    assert len(order) == 10 and len(set(visited)) == len(visited) == 100
    order.epoch = 1
    assert [index for batch in order for _, index in batch] != visited
    with pytest.raises(UsageError, match="5 training images do not fill one batch of 10"):
        EpochBatches(5, preset)


def test_all_images_are_shuffled_as_ever():
    """Runs of before are resumed in the order that they began."""
    assert random_key(0, "order", 0) == 4819849257279361181
    assert random_key(0, "augment", 3, 7) == 4169646252125455445
    preset = load_preset("cifar-nano", {"train.batch_size": 10})
    order = EpochBatches(105, preset, labels=[0] * 105, shards=np.zeros(105, dtype=np.int32))
    order.epoch = 3
    generator = torch.Generator().manual_seed(random_key(0, "order", 3))
    expected = torch.randperm(105, generator=generator).tolist()[:100]
    positions = [position for batch in order for position in batch]
    assert positions == [(3, image) for image in expected]
    assert {type(number) for position in positions for number in position} == {int}


def test_few_shards_are_open_at_a_time():
    shards = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 5, 6, 7, 90], 16)).astype(np.int32)
    preset = load_preset("cifar-nano", {"train.batch_size": 8, "data.shuffle": "shards:3"})

    def epoch(number, first_step=0, **ranks):
        order = EpochBatches(128, preset, shards=shards, **ranks)
        order.epoch, order.first_step = number, first_step
        return [[image for _, image in batch] for batch in order]

    first, second = (np.concatenate(epoch(number)) for number in (0, 1))
    for images in (first, second):
        assert sorted(images) == list(range(128))
        groups = [set(shards[images[start : start + 48]]) for start in (0, 48, 96)]
        assert [len(group) for group in groups] == [3, 3, 2] and len(set().union(*groups)) == 8
        assert len(set(shards[images[:12]])) == 3, "the images of the open shards are shuffled together"
    assert set(shards[first[:48]]) != set(shards[second[:48]])
    assert epoch(1, 5) == epoch(1)[5:]
    ranks = [epoch(1, rank=rank, size=2, accum=2) for rank in range(2)]
    together = [ranks[rank][2 * step + slice] for step in range(16) for rank in range(2) for slice in range(2)]
    assert np.concatenate(together).tolist() == second.tolist()
    with pytest.raises(UsageError, match="shuffle shards:3 is for tar shards, and cifar10 has none"):
        EpochBatches(128, preset)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0, 1, 3, 10, 200]), min_size=1, max_size=9), st.floats(0.01, 1))
def test_classes_are_balanced_as_far_as_asked(counts, balance):
    """A class without images among them."""
    assume(sum(counts))
    counts, size = np.array(counts), sum(counts)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    preset = load_preset("cifar-nano", {"train.batch_size": 1, "data.balance": balance})
    order = EpochBatches(size, preset, labels=labels)
    positions = [position for batch in order for position in batch]
    assert len(positions) == len(set(positions)) == size
    times = np.bincount([image for _, image, *_ in positions], minlength=size)
    # Of an image that occurs three times: (epoch, image), (epoch, image, 1), (epoch, image, 2).
    assert set(positions) == {(0, image, k)[: 2 + (k > 0)] for image in range(size) for k in range(times[image])}
    shares = np.where(counts, np.maximum(counts, 1.0) ** (1 - balance), 0)
    shares *= size / shares.sum()
    for label, count in enumerate(counts):
        of_class = times[labels == label]
        assert abs(of_class.sum() - shares[label]) < 1.000001 and (not count or np.ptp(of_class) <= 1)
    assert positions == [position for batch in EpochBatches(size, preset, labels=labels.tolist()) for position in batch]


def test_no_class_is_favoured_by_rounding():
    preset = load_preset("cifar-nano", {"train.batch_size": 1, "data.balance": 1.0})
    order, labels, drawn = EpochBatches(6, preset, labels=[0, 1, 1, 1, 2, 3]), torch.tensor([0, 1, 1, 1, 2, 3]), []
    for order.epoch in range(400):
        drawn.append(labels[order.order() % 6].bincount(minlength=4))
    assert torch.stack(drawn).float().mean(dim=0).tolist() == pytest.approx([1.5] * 4, abs=0.1)


def test_repeats_of_an_image_are_augmented_in_their_own_ways(folder):
    for name in ("cat/0", "dog/1", "dog/2", "dog/3"):
        (folder / "train" / f"{name}.png").unlink()
    preset = load_preset("cifar-nano", {"train.batch_size": 2, "data.balance": 1.0}, dataset="folder")
    source = open_split("folder", folder, train=True, mode="RGB")
    order = EpochBatches(len(source), preset, labels=source.labels)
    seen = []
    for workers in (0, 2):
        epoch = batches(train_loader(source, preset, order, workers=workers))
        images, labels = map(torch.cat, zip(*epoch, strict=True))
        seen.append(images)
    assert torch.equal(*seen)
    one, other = images[labels == 1]
    assert not torch.equal(one, other)


def test_the_recipe_reaches_the_transform():
    described = str(train_transform(load_preset("in1k-tiny")))
    for word in ("RandomResizedCropAndInterpolation", "RandAugment", "RandomErasing", "Flip", "Normalize"):
        assert word in described
    padded = str(train_transform(load_preset("cifar-tiny")))
    assert "RandomCrop(size=(32, 32), padding=4)" in padded and "RandAugment" in padded
    plain = str(train_transform(load_preset("digits-nano")))
    for word in ("RandAugment", "RandomErasing", "Flip", "ColorJitter"):
        assert word not in plain


def test_the_strongest_augmentation_of_the_recipe_works():
    # Magnitude 9 with its spread reaches 10 now and then, where an image may be posterised to 0 bits.
    transform = train_transform(load_preset("cifar-tiny", {"augment.rand_augment": "rand-m10-inc1"}))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    random.seed(0)
    for _ in range(300):
        assert transform(image).isfinite().all()


def test_evaluation_resizes_crops_and_normalises():
    preset = load_preset("in1k-tiny")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    pixels = eval_transform(preset)(image)
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.uint8
    assert torch.equal(
        pixels,
        torch.from_numpy(np.array(image.resize((341, 256), Image.Resampling.BICUBIC))).permute(2, 0, 1)[
            :, 16:240, 58:282
        ],
    )
    expected = (pixels / 255 - torch.tensor(preset.data.mean).view(3, 1, 1)) / torch.tensor(preset.data.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(Normalize(preset.data)(pixels[None])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_evaluation_prepares_images_as_torchvision_does(interpolation):
    rng = np.random.default_rng(0)
    preset = load_preset("digits-nano", {"data.eval_resize": 37, "data.interpolation": interpolation})
    reference = transforms.Compose(
        [
            transforms.Resize(37, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(preset.model.image_size),
            transforms.PILToTensor(),
        ]
    )
    for _ in range(50):
        image = Image.fromarray(rng.integers(0, 256, rng.integers(1, 90, 2), dtype=np.uint8))
        assert torch.equal(eval_transform(preset)(image), reference(image)), image.size


def test_evaluation_gives_each_image_once_in_order(folder):
    preset = load_preset("cifar-nano", dataset="folder")
    source = open_split("folder", folder, train=False, mode="RGB")
    labels = torch.cat([labels for _, labels in batches(eval_loader(source, preset, batch_size=3, workers=1))])
    assert labels.tolist() == [0, 0, 1, 1]


def test_training_and_evaluation_normalise_alike():
    preset = load_preset("cifar-nano", {"data.crop_padding": 0, "augment.hflip": 0.0})
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    class One:
        classes = ("a",)

        def __len__(self):
            return 1

        def load(self, index):
            return Image.fromarray(image), 0

    trained, _ = TrainSet(One(), preset)[0, 0]
    evaluated = Normalize(preset.data)(eval_transform(preset)(Image.fromarray(image))[None])[0]
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-5)
