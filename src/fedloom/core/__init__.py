"""The pure core: data types, the server as a state machine, and LoRA algebra. No clock, no network, no threads.

- `types`, `events`, `policies`: what travels, what happens and must be done, what a method implements.
- `server`: turns events into commands (begin to read here); `coordinator`: the interface that drivers use.
- `lora`, `truncated_svd`, `partial_depth`: factors and adapters, their decomposition, merges of clients of different depths.
- `validate_answer`: whether an answer that comes from outside may be used.
- `codec`, `transfer`, `message_size`: how numbers travel, what arrives on the other side, how many bytes that is.
- `model_shape`: what a task costs in FLOP, bytes and memory.
- `schema`: dataclasses to JSON and back, with checks.
- `seeds`, `fingerprint`, `files`, `indexed_dict`, `text`, `errors`: small tools.

The room imports torch and the standard library only (`schema` may import pydantic), and no other room. What is added here must be
needed by more than one room and must not read a clock, a file system (but for `files`) or a global random generator.
"""
