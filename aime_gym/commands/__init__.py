"""The commands of `aime-gym`, each a dataclass whose fields are its flags."""
