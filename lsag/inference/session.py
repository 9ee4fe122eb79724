"""Exported graphs in onnxruntime or OpenVINO, on the requested provider and no other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsag.config import Preset
from lsag.data.transforms import Normalize, check_images, eval_transform
from lsag.errors import UnavailableError, UsageError
from lsag.inference.graph import read_graph
from lsag.inference.predict import Predictor
from lsag.inference.providers import check_driver, choose_providers, has_driver
from lsag.inference.runtimes import OnnxRuntime, OpenVINO


class Session(Predictor):
    """An exported model, used like a `Classifier`.

    Calls take uint8 images (B, C, image_size, image_size) and give float32 logits (B, num_classes). `transform` makes
    such an image from a PIL image of any size. `preset`, `classes` and `input` are the file's metadata. `provider` is
    one of PRECISIONS, and `precision` what it computes in. `fallback_reason` says why "auto" did not choose CUDA;
    otherwise it is empty. A graph with a fixed batch size takes any number of images too: it runs several times, and
    the last batch is padded.
    """

    preset: Preset
    classes: tuple[str, ...]
    input: Mapping[str, Any]
    provider: str
    precision: str
    fallback_reason: str = ""

    def __init__(
        self,
        path: str | Path | bytes,
        *,
        provider: str = "cpu",
        precision: str | None = None,
        device_id: int = 0,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Open a file, or its contents, on `provider`: "cpu" (onnxruntime), "openvino", "cuda", "tensorrt" or "auto".

        "auto" is CUDA if it loads, else OpenVINO where it is installed, else onnxruntime on the CPU. `precision` is one
        that `choose_providers` allows; None is the graph's own. `device_id` is the number of the GPU, `threads` of CPU
        threads, by default one per core. `cuda_graph` is for "cuda" and a graph with a fixed batch size.
        InputError for anything but a complete export of lsag; UnavailableError if the provider does not load;
        UsageError for what does not fit together. A named provider is never replaced by another, except that
        onnxruntime computes shapes on the CPU.
        """
        if provider in ("cuda", "tensorrt"):
            check_driver(provider)
        graph = read_graph(path)
        metadata = graph.metadata
        self.preset, self.classes = metadata.preset, metadata.classes
        self.input, self.batch = metadata.input.model_dump(), metadata.input.batch
        if cuda_graph and (provider != "cuda" or self.batch is None):
            raise UsageError("a CUDA graph needs provider='cuda' and a fixed batch size", "lsag export --batch-size N")
        choices = choose_providers(provider, precision, metadata.precision)
        reasons = []
        if provider == "auto" and len(choices) > 1 and not has_driver():
            del choices["cuda"]
            reasons.append("no NVIDIA driver found")
        self.runtime: OnnxRuntime | OpenVINO
        for self.provider, wanted in choices.items():
            try:
                if self.provider == "openvino":
                    self.runtime = OpenVINO(graph, precision=wanted, threads=threads or 0)
                else:
                    self.runtime = OnnxRuntime(
                        graph,
                        provider=self.provider,
                        precision=wanted,
                        device_id=device_id,
                        threads=threads or 0,
                        cuda_graph=cuda_graph,
                    )
                break
            except UnavailableError as error:
                if self.provider == list(choices)[-1]:
                    raise
                reasons.append(str(error))
        self.fallback_reason, self.precision = "; ".join(reasons), self.runtime.precision
        self.raw_input = self.input["dtype"] == "float32"
        self.transform = eval_transform(self.preset)
        self._normalize = Normalize(self.preset.data)

    @property
    def device_name(self) -> str:
        return f"{self.runtime.name}, {self.precision}"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, image_size, image_size) -> logits, float32 (B, num_classes). UsageError for other images."""
        check_images(images, self.preset)
        if self.batch is None:
            return self._run(images)
        logits = []
        for part in images.split(self.batch):
            padded = part if len(part) == self.batch else part.repeat(self.batch, 1, 1, 1)[: self.batch]
            logits.append(self._run(padded)[: len(part)])
        return torch.cat(logits)

    def _run(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.runtime.run(self.feed(images).numpy()))

    def feed(self, images: Tensor) -> Tensor:
        """uint8 (B, C, image_size, image_size) -> the graph's input."""
        return (self._normalize(images) if self.raw_input else images.permute(0, 2, 3, 1)).contiguous()

    def bind(self, images: Tensor) -> Callable[[], object]:
        """A function that runs the graph on `images`, with input and output kept on the device, for benchmarks.

        UsageError if the graph has a fixed batch size, and `images` another.
        """
        if self.batch not in (None, len(images)):
            raise UsageError(
                f"the graph takes {self.batch} images at a time, not {len(images)}", f"--batch-size {self.batch}"
            )
        return self.runtime.bind(self.feed(images).numpy())

    def nodes_by_provider(self) -> dict[str, int]:
        """The number of nodes of the optimised graph that each execution provider runs."""
        return self.runtime.nodes()
