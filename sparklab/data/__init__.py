"""What a model learns from: reading chats, chat templates and the loss mask, the held-out split, packing.

``prepare(recipe, tokenizer)`` does all of it. Nothing here imports torch: rows are plain lists, and the trainer makes tensors of them.
"""

from sparklab.data.chat import Chat, Message
from sparklab.data.dataset import Prepared, Row, Rows, prepare
from sparklab.data.read import read_chats
from sparklab.data.render import Tokenizer
from sparklab.data.report import DataReport
from sparklab.data.template import IGNORED, ChatEncoder, Document, encode_chat, prompt_ids, stop_ids

__all__ = [
    "IGNORED",
    "Chat",
    "ChatEncoder",
    "DataReport",
    "Document",
    "Message",
    "Prepared",
    "Row",
    "Rows",
    "Tokenizer",
    "encode_chat",
    "prepare",
    "prompt_ids",
    "read_chats",
    "stop_ids",
]
