// Run once, when the database is made: the bot reads and writes its own database and nothing else.
db.getSiblingDB("backtest-kit").createUser({
  user: "bot",
  pwd: process.env.MONGO_BOT_PASSWORD,
  roles: [{ role: "readWrite", db: "backtest-kit" }],
});
