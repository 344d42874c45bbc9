"""Look inside an LSTM.

Its gates and states, step by step (``gates``), what freezing costs (``frozen``), and pictures
(``plot``).
"""
