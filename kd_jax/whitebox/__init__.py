"""Attacks that need the weights: noise on them, blocks exchanged between models, the logit lens, gradients."""
