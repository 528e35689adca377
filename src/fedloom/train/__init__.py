"""Training of real models: a base model of transformers with PEFT adapters, its local training, evaluation and export.

transformers and peft are imported in this room and nowhere else; besides them it uses torch, and from this package `core`,
`hierarchy` and `data`. Rooms above it see functions of plain values: texts and an adapter go in, an adapter or figures come out.

- `settings`: what users choose (`LoRA`, `Training`, `Engine`, `Generation`); light to import.
- `pretrained`, `base_model`, `peft_weights`: the frozen model, shared by all simulated clients, and its adapter slots.
- `checkpoint`, `text_checks`: what is asked of model and tokenizer before anything is trained. `library_messages`: what the
  libraries say, as notes.
- `tokenised`, `chat_template`: texts as token ids, and the batches of a task.
- `trainer`, `objective`, `loss`: one task from the adapter that is received to the adapter that is returned.
- `engine`: ways to compute the same in less time. `workers`: other processes that train.
- `evaluate`: predictions, generated answers, and their metrics, those of labels by `confusion`. `text_features`: lengths, embeddings
  and quality of texts.
- `export`: adapters as PEFT folders. `demo_model`: the encoder and the language model of `fedloom demo`.
"""

from __future__ import annotations
