"""How many slots each layer of an engine has."""
