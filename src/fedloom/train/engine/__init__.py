"""Ways to train faster or in less memory without changing the method; one trick a module, each switched by a field of `Engine`.

- `linear_kernel`: frozen linear layers through oneDNN, or in bfloat16; a layer and its adapter as one node of the graph.
- `dropout`: masks from random bytes, and attention with dropout.
- `first_token`: the last layer of an encoder for the first token alone.
- `answer_tokens`: the last block of a model that writes, for the tokens whose logits are made.
- `frozen_layers`: layers below all trained ones run once, without a graph, and their output is kept.
- `activation_files`: that output in a folder, for other runs.
- `batched_clients`: several clients in one forward and backward pass.
- `record_gradients`: the gradient of each example in one pass, for `Run.privacy` with unit "record"; no trick of speed.
- `trial_texts`: what a trick is tried on. Not every architecture allows every trick: whether this one does is tried on the model, and
  where it does not, the model is computed plainly and a note of the run says so.

A new trick is a module here, a field of `settings.Engine` that can switch it off, and one call in `base_model.load_base` (if it
changes the model) or in `trainer.PeftTrainer` (if it changes how tasks are computed). It must give the results of plain torch up
to rounding, and a test in `tests/train/engine` compares the two.
"""
