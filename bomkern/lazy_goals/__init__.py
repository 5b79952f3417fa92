"""Goals given as functions of rows, evaluated without a graph and again with one for the rows that receive gradient."""
