"""The change that a PEFT type makes of a weight: pure tensors in, a dense tensor out."""
