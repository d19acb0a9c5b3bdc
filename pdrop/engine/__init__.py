"""Drop visual tokens inside an unmodified transformers model.

    with attach(model, PyramidDrop(), pyramid(num_layers=32)) as trace:
        model.generate(**inputs)

Removal is real: behind a boundary every layer computes on fewer rows and caches fewer keys. Behind the last layer the
rows go back to their places (zeros where tokens were dropped), so labels, `logits_to_keep`, losses and `generate` see
the shapes they always saw. After the block the model is as it was, to the bit and to the hook.

Where the official codes are silent:
- a query token is never dropped, even if it is visual (a prompt that ends in its image): its logits are needed. It
  counts among those kept;
- in training, rows without an image or without an answer are not dropped at all;
- a cache that was filled under one schedule goes on under that schedule only;
- images that come in a later turn are ranked among themselves; those already cached are left alone;
- `generate(use_cache=False)` ranks again at each step, by the newest token.
"""

from pdrop.engine.hooks import Attachment, attach
from pdrop.engine.trace import Trace

__all__ = ["Attachment", "Trace", "attach"]
