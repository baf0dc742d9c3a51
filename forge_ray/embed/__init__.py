"""Item vectors before quantizing: fusing behaviour into what the user brought."""
