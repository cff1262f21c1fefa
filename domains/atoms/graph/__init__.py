"""From positions to what the models see: pairs, ranked neighbours, tables, features of geometry."""
