"""folder, imagenet: images in one folder per class."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lsag.data.folders import because, image_files, listed, walk
from lsag.data.images import REPAIR, TRAINING_FIX
from lsag.data.sources import EncodedSource, Names
from lsag.data.storage import regular_file
from lsag.errors import InputError


class FolderSource(EncodedSource):
    """Images in one folder per class, classes in alphabetical order.

    InputError for a folder that cannot be read, no images, and with `complete` for a class without images.
    """

    def __init__(self, root: Path, mode: str, *, complete: bool = True) -> None:
        self.root = root
        unused: Counter[str] = Counter()
        _, classes, files = next(walk(root, unused))
        unused["in no class folder"] = len(files)
        counts: list[int] = []

        def found() -> Iterator[str]:
            for name in classes:
                folder, unused_here = str(root / name), Counter[str]()
                paths = sorted(image_files(folder, unused_here))
                yield from (name + path.removeprefix(folder) for path in paths)
                if not paths and complete:
                    raise InputError(
                        f"{folder} has no images{because(unused_here)}", "add images, or remove the class everywhere"
                    )
                counts.append(len(paths))
                unused.update(unused_here)

        names = Names(found())
        if not len(names):
            raise InputError(
                f"{root} has no images in folders of classes{because(unused)}", "put images into a folder per class"
            )
        super().__init__(
            names,
            np.repeat(np.arange(len(classes)), counts),
            classes,
            where=str(root),
            mode=mode,
            fix=TRAINING_FIX if complete else REPAIR,
            notes=(f"not used in {root}: {listed(unused)}",) if unused.total() else (),
        )

    def open(self, row: int) -> BinaryIO:
        return regular_file(Path(self.root, self.names[row]))

    def size(self, row: int) -> int:
        return Path(self.root, self.names[row]).stat().st_size
