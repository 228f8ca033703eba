"""Other kinds of pretrained model: few-step networks, bridges, phase space."""
