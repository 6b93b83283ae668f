"""Stand-ins for what only a machine with an Ascend processor has. Never installed with the product."""
