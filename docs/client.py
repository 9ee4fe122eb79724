"""A client for default exports: only numpy, Pillow and onnxruntime. python client.py model.onnx cat.jpg dog.jpg"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

ORIENTATION, TURN = 0x0112, Image.Transpose
TURNS = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270}
TURNS |= {7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}


def upright(image):
    """Turn a photograph as its EXIF data says, unless it is damaged."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def prepare(image, rule):
    """Resize the shorter side and crop the centre, as the metadata says: uint8 (height, width, channels)."""
    image, crop = upright(image).convert(rule["mode"]), rule["center_crop"]
    size = [int(rule["resize_shorter_side"] * side / min(image.size)) for side in image.size]
    image = image.resize(size, Image.Resampling[rule["interpolation"].upper()])
    left, top = (round((side - crop) / 2) for side in size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["lsag"])
    for path in sys.argv[2:]:
        (logits,) = session.run(["logits"], {"images": prepare(Image.open(path), metadata["input"])[None]})
        print(metadata["classes"][logits[0].argmax()], path)
