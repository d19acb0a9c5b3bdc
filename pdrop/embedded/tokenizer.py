"""The model's tokenizer: a token per word of the corpus, single characters for everything else.

WordPiece over `vocabulary.words()` and every printable character, alone ("A") and as a continuation ("##A"): any ASCII
prompt can be encoded, and a code such as 6995 is four tokens.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from .vocabulary import words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD_ID, BEGIN_ID, END_ID, _, IMAGE_ID = range(len(SPECIAL))

# The USER/ASSISTANT layout of LLaVA-1.5, without its system sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens in the order of their ids."""
    characters = [character for character in string.printable if not character.isspace()]
    listed = [*SPECIAL, *words(), *characters, *("##" + character for character in characters)]
    return list(dict.fromkeys(listed))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer for transformers; it puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=64))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        additional_special_tokens=[IMAGE],
    )
