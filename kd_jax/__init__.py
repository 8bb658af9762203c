"""Train, distil and score language models on a JAX mesh."""
