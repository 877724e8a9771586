"""The arguments of a training, their allowed values, and the parsing of command lines."""
