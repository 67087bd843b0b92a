"""Plugin contracts to and from protobuf, both ways, one module per kind.

Every module of a kind has two functions. `remote` makes an object of our contract out of a
connection to an external plugin; what comes back over it is hostile and checked. `methods` serves
an object of our contract as the gRPC service a host expects. `table` finds them.
"""
