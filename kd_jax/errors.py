"""The error of a setting that cannot be used."""


class ConfigError(ValueError):
    """A key of the config, or a flag, that cannot be used as it is; the message names it and says what would do."""
