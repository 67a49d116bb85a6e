"""What a model learns from: reading records, chat templates and the loss mask, the held-out split, packing.

``prepare(recipe, tokenizer)`` does all of it. Nothing here imports torch: rows are plain lists, and the trainer makes tensors of them.
"""

from sparklab.data.dataset import Prepared, Row, Rows, prepare
from sparklab.data.encode import Encoded, Encoder
from sparklab.data.read import Source, open_source, read_records
from sparklab.data.record import Message, Record
from sparklab.data.render import Tokenizer
from sparklab.data.report import DataReport
from sparklab.data.template import IGNORED, ChatEncoder, Document, encode_chat, prompt_ids, stop_ids

__all__ = [
    "IGNORED",
    "ChatEncoder",
    "DataReport",
    "Document",
    "Encoded",
    "Encoder",
    "Message",
    "Prepared",
    "Record",
    "Row",
    "Rows",
    "Source",
    "Tokenizer",
    "encode_chat",
    "open_source",
    "prepare",
    "prompt_ids",
    "read_records",
    "stop_ids",
]
