"""How long a run takes on so many nodes, before one asks for them: `gigamil simulate` and `gigamil bench calibrate`."""
