"""Look inside an LSTM: its gates and states, step by step (``gates``), and pictures (``plot``)."""
