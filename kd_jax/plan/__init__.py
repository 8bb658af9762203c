"""Plans: what a config's programs need on a machine that is not here."""
