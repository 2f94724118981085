"""MongoDB + Redis: every record and candle of a program in MongoDB, with Redis as an index of ids.

Arrows go down: store -> upkeep, diagnosis -> candles, writing -> reading -> schema -> connection -> server -> documents
-> settings; redis_ids stands beside connection. The drivers, pymongo and redis, are imported in this folder only, and
`settings` needs neither of them.
"""
