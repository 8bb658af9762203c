"""Many chains teacher -> student, each on its own random half of a pool: what LiRA and RMIA compare a model with."""
